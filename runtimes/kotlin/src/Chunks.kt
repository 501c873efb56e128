package smolport

import java.nio.FloatBuffer

/** What feeding the decoder of an ONNX bundle takes besides the engine. */
object Chunks {
    const val SIZE = 128 // tokens of a prompt that run at once: more are no faster and hold more memory

    /** Where each run of a prompt starts and stops (not included). */
    fun of(tokens: Int): List<Pair<Int, Int>> = (0 until tokens step SIZE).map { it to minOf(it + SIZE, tokens) }

    /** Tokens that a cache bound in place has room for when it must hold [tokens]. */
    fun room(tokens: Int, context: Int): Int = minOf(context, tokens + maxOf(64, tokens / 8))

    /** Throws BadInput unless [ids] can be fed after [past] tokens. */
    fun check(ids: List<Int>, past: Int, text: TextLimits) {
        if (ids.isEmpty()) throw BadInput("no tokens to run")
        if (past.toLong() + ids.size > text.context)
            throw BadInput("${ids.size} tokens after the $past so far do not fit into the context of ${text.context}")
        if (ids.min() < 0 || ids.max() >= text.vocab)
            throw BadInput("token ids from ${ids.min()} to ${ids.max()}, want 0 to ${text.vocab - 1}")
    }

    /** Puts the rows of [features], f32 [M, hidden], into [embeds], f32 [T, hidden], in the places of the image token. */
    fun place(features: FloatArray, embeds: FloatArray, ids: List<Int>, imageId: Int) {
        val hidden = embeds.size / ids.size
        val places = ids.indices.filter { ids[it] == imageId }
        if (features.size != places.size * hidden)
            throw BadInput("image features have ${features.size} numbers, want $hidden for each of ${places.size} image tokens")
        for ((row, place) in places.withIndex())
            features.copyInto(embeds, place * hidden, row * hidden, (row + 1) * hidden)
    }

    /**
     * Moves a tensor of the cache into a roomier one: [from] is f32 [heads, room, width], [to] the same with more room.
     *
     * @param length tokens in use: the first rows of each head.
     */
    fun move(from: FloatBuffer, to: FloatBuffer, heads: Int, width: Int, length: Int) {
        val old = from.capacity() / heads
        val new = to.capacity() / heads
        if (length * width > minOf(old, new)) throw BadInput("a cache of $length tokens does not fit")
        for (head in 0 until heads) {
            val source = from.duplicate()
            source.position(head * old).limit(head * old + length * width)
            to.duplicate().apply { position(head * new) }.put(source)
        }
    }
}
