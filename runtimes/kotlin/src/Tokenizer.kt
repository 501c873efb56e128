package smolport

import java.util.PriorityQueue

/**
 * The tokenizer of tokenizer.json: byte-level BPE behind the pre-tokenizers Digits and ByteLevel, as all of SmolVLM2 has.
 *
 * Any other normalizer, pre-tokenizer, model or decoder is refused by name. Post-processor, padding and truncation are
 * not used: prompts are built by [PromptEncoder].
 */
class Tokenizer private constructor(
    private val vocab: Map<String, Int>,
    private val merges: Map<Long, Merge>,
    private val unknown: Int?,
    private val added: List<Added>,
) {
    private class Merge(val rank: Int, val id: Int)

    class Added internal constructor(val content: String, val id: Int, val special: Boolean, internal val normalized: Boolean)

    /** Ids of the 256 letters that stand for bytes; -1 where the vocabulary lacks one. */
    private val letterIds = IntArray(256) { vocab[LETTERS[it].toString()] ?: -1 }
    private val contents = HashMap<Int, String>().apply {
        for ((token, id) in vocab) put(id, token)
        for (token in added) put(token.id, token.content)
    }
    private val first = added.filter { !it.normalized }.startingWith()
    private val second = added.filter { it.normalized }.startingWith() // after the others, in what they left

    val special: List<Added> get() = added.filter { it.special }

    fun id(token: String): Int? = added.firstOrNull { it.content == token }?.id ?: vocab[token]

    fun token(id: Int): String? = contents[id]

    /** Ids of a text. With [plain], added tokens that it spells are the characters that they consist of. */
    fun encode(text: String, plain: Boolean = false): List<Int> {
        val out = ArrayList<Int>()
        if (plain) pieces(text, out) else split(text, first, out) { rest -> split(rest, second, out) { pieces(it, out) } }
        return out
    }

    /** The text of ids, special tokens left out. Bytes that are no UTF-8 become U+FFFD as Rust's `from_utf8_lossy` does. */
    fun decode(ids: List<Int>): String {
        val bytes = java.io.ByteArrayOutputStream()
        val left = added.filter { it.special }.map { it.content }.toSet()
        for (token in ids.mapNotNull(contents::get)) {
            if (token in left) continue
            val letters = token.map { BYTES[it] ?: -1 }
            if (-1 in letters) bytes.write(token.toByteArray()) else letters.forEach(bytes::write)
        }
        return Utf8.lossy(bytes.toByteArray())
    }

    /** Cuts added tokens out of a text, at each place the longest; [rest] takes what is between them. */
    private fun split(text: String, tokens: Map<Char, List<Added>>, out: MutableList<Int>, rest: (String) -> Unit) {
        var start = 0
        var at = 0
        while (at < text.length) {
            val token = tokens[text[at]]?.firstOrNull { text.startsWith(it.content, at) }
            if (token == null) {
                at++
                continue
            }
            if (start < at) rest(text.substring(start, at))
            out += token.id
            at += token.content.length
            start = at
        }
        if (start < at) rest(text.substring(start))
    }

    /** Digits, then ByteLevel: each digit is a piece, the rest is cut by the expression of GPT-2. */
    private fun pieces(text: String, out: MutableList<Int>) {
        val codes = text.codePoints().toArray()
        var at = 0
        while (at < codes.size) {
            if (Unicode.isDigit(codes[at])) {
                merge(codes, at, ++at, out)
                continue
            }
            var end = at
            while (end < codes.size && !Unicode.isDigit(codes[end])) end++
            while (at < end) {
                val next = pieceEnd(codes, at, end)
                merge(codes, at, next, out)
                at = next
            }
        }
    }

    /** Where the piece ends that starts at [at]: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
    private fun pieceEnd(codes: IntArray, at: Int, end: Int): Int {
        if (codes[at] == '\''.code)
            for (ending in ENDINGS)
                if (ending.length < end - at && ending.indices.all { codes[at + 1 + it] == ending[it].code })
                    return at + 1 + ending.length
        val start = if (codes[at] == ' '.code && at + 1 < end) at + 1 else at
        for (kind in KINDS) {
            if (!kind(codes[start])) continue
            var next = start + 1
            while (next < end && kind(codes[next])) next++
            return next
        }
        var next = at
        while (next < end && Unicode.isSpace(codes[next])) next++
        return if (next == end || next == at + 1) next else next - 1 // the last one goes with the word that follows
    }

    /** BPE over the bytes of a piece: the pair of the lowest rank first, of equal ones the leftmost. */
    private fun merge(codes: IntArray, from: Int, to: Int, out: MutableList<Int>) {
        val bytes = String(codes, from, to - from).toByteArray()
        val ids = bytes.map { letterIds[it.toInt() and 255] }.mapNotNull { if (it < 0) unknown else it }.toIntArray()
        val next = IntArray(ids.size) { it + 1 }
        val previous = IntArray(ids.size) { it - 1 }
        val queue = PriorityQueue<Long>()

        fun pair(at: Int) = merges[key(ids[at], ids[next[at]])]

        fun offer(at: Int) {
            if (at >= 0 && next[at] < ids.size) pair(at)?.let { queue += it.rank.toLong() shl 32 or at.toLong() }
        }
        for (at in 0 until ids.size - 1) offer(at)
        while (queue.isNotEmpty()) {
            val best = queue.poll()
            val at = best.toInt()
            val merge = if (ids[at] >= 0 && next[at] < ids.size) pair(at) else null
            if (merge == null || merge.rank != (best shr 32).toInt()) continue // one of the two is another by now
            ids[at] = merge.id
            ids[next[at]] = -1
            next[at] = next[next[at]]
            if (next[at] < ids.size) previous[next[at]] = at
            offer(previous[at])
            offer(at)
        }
        ids.filterTo(out) { it >= 0 }
    }

    companion object {
        private const val MOST_ID = 1 shl 24
        private val ENDINGS = listOf("s", "t", "re", "ve", "m", "ll", "d")
        private val KINDS: List<(Int) -> Boolean> = listOf(
            Unicode::isLetter,
            Unicode::isNumber,
            { !Unicode.isSpace(it) && !Unicode.isLetter(it) && !Unicode.isNumber(it) },
        )

        /** Byte -> the character that stands for it: itself where it is visible in Latin-1, else 256 and on, in order. */
        private val LETTERS: CharArray = CharArray(256).also { letters ->
            var other = 256
            for (byte in 0..255) {
                val visible = byte in 33..126 || byte in 161..172 || byte in 174..255
                letters[byte] = if (visible) byte.toChar() else (other++).toChar()
            }
        }
        private val BYTES: Map<Char, Int> = LETTERS.withIndex().associate { (byte, letter) -> letter to byte }

        private fun key(left: Int, right: Int): Long = left.toLong() shl 32 or right.toLong()

        private fun List<Added>.startingWith(): Map<Char, List<Added>> =
            sortedByDescending { it.content.length }.groupBy { it.content[0] }

        /** Reads tokenizer.json. Throws BadInput for what this port does not know. */
        fun parse(json: Json): Tokenizer {
            if (json.find("normalizer")?.isNull == false) throw BadInput("${json.where}: has a normalizer, want none")
            val steps = json["pre_tokenizer"].run { want("type", "Sequence"); this["pretokenizers"].items() }
            if (steps.size != 2) throw BadInput("${json.where}: has ${steps.size} pre-tokenizers, want Digits and ByteLevel")
            steps[0].want("type", "Digits")
            steps[0].want("individual_digits", true)
            steps[1].want("type", "ByteLevel")
            steps[1].want("add_prefix_space", false)
            if (steps[1].find("use_regex") != null) steps[1].want("use_regex", true)
            json["decoder"].want("type", "ByteLevel")
            val model = json["model"]
            model.want("type", "BPE")
            for (key in listOf("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
                model.find(key)?.let {
                    if (!it.isNull && !(it.isString && it.string() == "")) throw BadInput("${it.where} is given, want null")
                }
            for (key in listOf("fuse_unk", "byte_fallback", "ignore_merges")) if (model.find(key) != null) model.want(key, false)
            val vocab = HashMap<String, Int>()
            for ((token, id) in model["vocab"].entries()) vocab[token] = id.int(0, MOST_ID)
            if (vocab.values.toSet().size < vocab.size) throw BadInput("${model["vocab"].where}: gives an id twice")
            val unknown = model.find("unk_token")?.takeIf { !it.isNull }?.let {
                vocab[it.string()] ?: throw BadInput("${it.where} is ${shown(it.string())}, want a token of the vocabulary")
            }
            return Tokenizer(vocab, merges(model["merges"], vocab), unknown, added(json["added_tokens"], vocab))
        }

        private fun Json.want(key: String, wanted: Any) {
            val value = this[key]
            val found: Any = if (wanted is Boolean) value.boolean() else value.string()
            if (found != wanted) throw BadInput("${value.where} is ${shown("$found")}, want $wanted: this port knows no other")
        }

        private fun merges(json: Json, vocab: Map<String, Int>): Map<Long, Merge> {
            val out = HashMap<Long, Merge>()
            json.items().forEachIndexed { rank, item ->
                val pair = if (item.isString) item.string().split(' ') else item.items().map { it.string() } // old form, new form
                if (pair.size != 2) throw BadInput("${item.where} has ${pair.size} parts, want 2")
                fun id(token: String) =
                    vocab[token] ?: throw BadInput("${item.where}: ${shown(token)} is not in the vocabulary")
                if (out.put(key(id(pair[0]), id(pair[1])), Merge(rank, id(pair[0] + pair[1]))) != null)
                    throw BadInput("${item.where} is there twice")
            }
            return out
        }

        private fun added(json: Json, vocab: Map<String, Int>): List<Added> {
            val ids = vocab.values.toHashSet()
            return json.items().map {
                val content = it["content"].string()
                val id = it["id"].int(0, MOST_ID)
                for (key in listOf("single_word", "lstrip", "rstrip")) it.want(key, false)
                if (content.isEmpty()) throw BadInput("${it.where}: content is empty")
                val own = vocab[content]
                if (own != null && own != id)
                    throw BadInput("${it.where}: id of ${shown(content)} is $id, the vocabulary says $own")
                if (own == null && !ids.add(id)) throw BadInput("${it.where}: id $id is another token's")
                Added(content, id, it["special"].boolean(), it["normalized"].boolean())
            }
        }
    }
}

/** UTF-8 -> text; what is none becomes U+FFFD, one for each longest beginning of a character (Unicode's practice). */
internal object Utf8 {
    fun lossy(bytes: ByteArray): String {
        val out = StringBuilder()
        var at = 0
        while (at < bytes.size) {
            val first = bytes[at].toInt() and 255
            val more = when (first) {
                in 0..0x7F -> 0
                in 0xC2..0xDF -> 1
                in 0xE0..0xEF -> 2
                in 0xF0..0xF4 -> 3
                else -> -1
            }
            var code = if (more > 0) first and (0x3F shr more) else first
            var read = 1
            while (read <= more && at + read < bytes.size) {
                val next = bytes[at + read].toInt() and 255
                if (next !in follows(first, read)) break
                code = code shl 6 or (next and 63)
                read++
            }
            if (more >= 0 && read == more + 1) out.appendCodePoint(code) else out.append('\uFFFD')
            at += read
        }
        return out.toString()
    }

    /** What may follow: no overlong form, no surrogate, nothing beyond U+10FFFF. */
    private fun follows(first: Int, place: Int): IntRange = when {
        place > 1 -> 0x80..0xBF
        first == 0xE0 -> 0xA0..0xBF
        first == 0xED -> 0x80..0x9F
        first == 0xF0 -> 0x90..0xBF
        first == 0xF4 -> 0x80..0x8F
        else -> 0x80..0xBF
    }
}

/** Tokens in, whole characters out: what is no character yet waits for the tokens that end it. */
class TextStream(private val tokenizer: Tokenizer) {
    private val ids = ArrayList<Int>() // since the last place where the text so far was whole
    private var sent = 0 // characters of them that were given out

    fun push(token: Int): String {
        ids += token
        val text = tokenizer.decode(ids)
        val whole = !text.endsWith('\uFFFD')
        val piece = text.substring(sent, if (whole) text.length else text.length - 1)
        sent += piece.length
        if (whole) {
            ids.clear()
            sent = 0
        }
        return piece
    }
}
