// UNVERIFIED: a sample that has never been compiled or run; see AskActivity.kt.
package smolport.sample

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import smolport.Bundle
import smolport.Chunks

/** The graphs of a bundle in ONNX Runtime, and the cache of one conversation. One thread at a time. */
class Decoder(bundle: Bundle, threads: Int = 4) : AutoCloseable {
    private val sizes = bundle.manifest.text
    private val image = bundle.manifest.image
    private val environment = OrtEnvironment.getEnvironment()
    private val sessions = listOf("embed_tokens" to 1, "vision_encoder" to threads, "decoder_model_merged" to threads)
        .associate { (name, number) -> name to open(bundle, name, number) }
    private val names = (0 until sizes.layers).flatMap { listOf("$it.key", "$it.value") }
    private var cache = names.associateWith { direct(0) }
    private var room = 0

    /** Tokens in the cache. */
    var length = 0
        private set

    fun clear() {
        length = 0
    }

    /** Tiles f32 [N, 3, S, S] -> features f32 [N, L, hidden], one tile a run: they do not influence each other. */
    fun encodeImage(pixels: FloatArray, tiles: Int): FloatArray {
        val side = image.tileSize.toLong()
        val each = pixels.size / tiles
        val out = FloatArray(tiles * image.tokensPerTile * sizes.hidden)
        val mask = ByteBuffer.allocateDirect((side * side).toInt())
        for (i in 0 until mask.capacity()) mask.put(i, 1)
        for (tile in 0 until tiles) {
            val values = OnnxTensor.createTensor(environment, FloatBuffer.wrap(pixels, tile * each, each).slice(), longArrayOf(1, 1, 3, side, side))
            val seen = OnnxTensor.createTensor(environment, mask, longArrayOf(1, 1, side, side), ai.onnxruntime.OnnxJavaType.BOOL)
            values.use { seen.use {
                session("vision_encoder").run(mapOf("pixel_values" to values, "pixel_attention_mask" to seen)).use {
                    (it[0] as OnnxTensor).floatBuffer.get(out, tile * out.size / tiles, out.size / tiles)
                }
            } }
        }
        return out
    }

    /** Feeds [ids], with a row of [features] for each image token; the logits after the last. */
    fun extend(ids: List<Int>, features: FloatArray?): FloatArray {
        Chunks.check(ids, length, sizes)
        val embeds = embed(ids)
        if (features != null) Chunks.place(features, embeds, ids, sizes.imageTokenId)
        grow(length + ids.size)
        var logits = FloatArray(0)
        for ((start, stop) in Chunks.of(ids.size)) {
            logits = run(embeds, start, stop)
            length += stop - start
        }
        return logits
    }

    override fun close() = sessions.values.forEach { it.close() }

    private fun session(name: String) = sessions.getValue(name)

    private fun open(bundle: Bundle, name: String, threads: Int): OrtSession = OrtSession.SessionOptions().use {
        it.setIntraOpNumThreads(threads)
        it.setMemoryPatternOptimization(false) // a pattern would be kept for every length that ever ran
        environment.createSession(bundle.graph(name).path, it) // a path, so that it finds its external data
    }

    private fun embed(ids: List<Int>): FloatArray {
        val buffer = LongBuffer.wrap(LongArray(ids.size) { ids[it].toLong() })
        return OnnxTensor.createTensor(environment, buffer, longArrayOf(1, ids.size.toLong())).use { tokens ->
            session("embed_tokens").run(mapOf("input_ids" to tokens)).use {
                FloatArray(ids.size * sizes.hidden).also((it[0] as OnnxTensor).floatBuffer::get)
            }
        }
    }

    private fun grow(tokens: Int) {
        if (tokens <= room) return
        val wanted = Chunks.room(tokens, sizes.context)
        cache = cache.mapValues { (_, old) ->
            direct(wanted).also { if (length > 0) Chunks.move(old, it, sizes.kvHeads, sizes.headDim, length) }
        }
        room = wanted
    }

    private fun direct(tokens: Int): FloatBuffer =
        ByteBuffer.allocateDirect(4 * sizes.kvHeads * tokens * sizes.headDim).order(ByteOrder.nativeOrder()).asFloatBuffer()

    /** One run of the decoder. The same buffers are past and present: `smolport.kv_cache = in_place` of its metadata. */
    private fun run(embeds: FloatArray, start: Int, stop: Int): FloatArray {
        val rows = stop - start
        val total = length + rows
        val made = ArrayList<OnnxTensor>()
        fun <T : OnnxTensor> T.kept() = also { made += it }
        try {
            val shape = longArrayOf(1, sizes.kvHeads.toLong(), room.toLong(), sizes.headDim.toLong())
            val tensors = cache.mapValues { OnnxTensor.createTensor(environment, it.value.duplicate(), shape).kept() }
            val part = FloatBuffer.wrap(embeds, start * sizes.hidden, rows * sizes.hidden).slice()
            val inputs = HashMap<String, OnnxTensor>()
            inputs["inputs_embeds"] = OnnxTensor.createTensor(environment, part, longArrayOf(1, rows.toLong(), sizes.hidden.toLong())).kept()
            val ones = LongBuffer.wrap(LongArray(total) { 1 })
            inputs["attention_mask"] = OnnxTensor.createTensor(environment, ones, longArrayOf(1, total.toLong())).kept()
            inputs["num_logits_to_keep"] = OnnxTensor.createTensor(environment, 1L).kept()
            for ((name, tensor) in tensors) inputs["past_key_values.$name"] = tensor
            val present = tensors.mapKeys { "present.${it.key}" }
            session("decoder_model_merged").run(inputs, setOf("logits"), present).use {
                return FloatArray(sizes.vocab).also((it["logits"].get() as OnnxTensor).floatBuffer::get)
            }
        } finally {
            made.forEach { it.close() }
        }
    }
}
