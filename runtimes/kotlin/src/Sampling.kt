package smolport

import kotlin.math.exp
import kotlin.math.ln

/** How tokens are chosen. The formulae are those of transformers' logits processors, in its order. */
class Sampling(
    val temperature: Double = 0.0, // 0: greedy, the best token each time
    val topK: Int = 0, // 0: no limit
    val topP: Double = 1.0,
    val repetitionPenalty: Double = 1.0,
) {
    init {
        if (!(temperature >= 0 && temperature < Double.POSITIVE_INFINITY))
            throw BadInput("temperature is $temperature, want 0 or more")
        if (topK < 0) throw BadInput("top_k is $topK, want 0 or more")
        if (!(topP > 0 && topP <= 1)) throw BadInput("top_p is $topP, want above 0, at most 1")
        if (!(repetitionPenalty > 0 && repetitionPenalty < Double.POSITIVE_INFINITY))
            throw BadInput("repetition_penalty is $repetitionPenalty, want above 0")
    }

    /**
     * Logits after repetition penalty, temperature, top-k and top-p; what is ruled out is minus infinity.
     *
     * @param seen every token of the conversation so far, the prompt's too.
     */
    fun scores(logits: FloatArray, seen: Iterable<Int>): FloatArray {
        val out = logits.copyOf()
        if (repetitionPenalty != 1.0) {
            val penalty = repetitionPenalty.toFloat()
            for (id in seen.toSet()) out[id] = if (out[id] < 0) out[id] * penalty else out[id] / penalty
        }
        if (temperature == 0.0) return out
        for (id in out.indices) out[id] = out[id] / temperature.toFloat()
        if (topK in 1 until out.size) {
            val least = out.sortedArray()[out.size - topK]
            for (id in out.indices) if (out[id] < least) out[id] = Float.NEGATIVE_INFINITY // equal ones stay
        }
        if (topP < 1) {
            val order = ascending(out)
            val logs = logSoftmax(FloatArray(out.size) { out[order[it]] })
            var total = 0.0
            for (place in 0 until order.size - 1) {
                total += exp(logs[place])
                if (total <= 1 - topP) out[order[place]] = Float.NEGATIVE_INFINITY
            }
        }
        return out
    }

    /**
     * The next token; never [imageId], which in an answer stands for nothing.
     *
     * @param random from 0, below 1.
     * @throws BadInput if the logits hold NaN or infinity: the engine failed.
     */
    fun choose(logits: FloatArray, seen: Iterable<Int>, imageId: Int, random: () -> Double): Int {
        if (logits.any { !it.isFinite() }) throw BadInput("logits hold NaN or infinity")
        val scores = scores(logits, seen)
        scores[imageId] = Float.NEGATIVE_INFINITY
        return if (temperature == 0.0) best(scores) else draw(scores, random())
    }

    companion object {
        /** The index of the largest, of equal ones the first. */
        fun best(values: FloatArray): Int = values.indices.fold(0) { best, i -> if (values[i] > values[best]) i else best }

        /** Natural logarithms of the probabilities. */
        fun logSoftmax(logits: FloatArray): DoubleArray {
            val most = logits.max().toDouble()
            var total = 0.0
            for (logit in logits) total += exp(logit - most)
            return DoubleArray(logits.size) { logits[it] - most - ln(total) }
        }

        private fun draw(scores: FloatArray, random: Double): Int {
            val totals = logSoftmax(scores).map { exp(it) }.runningReduce { a, b -> a + b }
            val most = totals.last()
            return minOf(totals.indexOfFirst { it > random * most }.let { if (it < 0) totals.size else it }, totals.indexOf(most))
        }

        /** Indices by value, the least first, equal ones in their order. */
        private fun ascending(values: FloatArray): IntArray {
            val keys = LongArray(values.size) {
                val bits = (values[it] + 0f).toRawBits() // -0 becomes 0
                (if (bits < 0) bits xor Int.MAX_VALUE else bits).toLong() shl 32 or it.toLong()
            }
            keys.sort()
            return IntArray(values.size) { keys[it].toInt() }
        }
    }
}
