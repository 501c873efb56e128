package smolport.test

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.security.MessageDigest
import java.util.Base64
import smolport.BadInput
import smolport.Bundle
import smolport.Case
import smolport.Chunks
import smolport.Image
import smolport.ImagePart
import smolport.ImageSettings
import smolport.Json
import smolport.Limits
import smolport.Manifest
import smolport.Message
import smolport.Pin
import smolport.PromptEncoder
import smolport.PublicKey
import smolport.Rgb
import smolport.SafeTensors
import smolport.Sampling
import smolport.Text
import smolport.TextLimits
import smolport.TextStream
import smolport.Tokenizer
import smolport.Verdict
import smolport.check

// One request a line of stdin, one answer a line of stdout, both JSON: what tests/test_kotlin.py asks of the port.
// {"error": ...} is a BadInput; {"crash": ...} anything else that was thrown, which is a fault of the port.

private val tokenizers = HashMap<String, Tokenizer>()
private val encoders = HashMap<String, PromptEncoder>()

private fun tokenizer(request: Json) = request["tokenizer"].string().let {
    tokenizers.getOrPut(it) { Tokenizer.parse(Json.read(File(it))) }
}

private fun bytes(json: Json): ByteArray = Base64.getDecoder().decode(json.string())

private fun floats(json: Json): FloatArray {
    val buffer = ByteBuffer.wrap(bytes(json)).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
    return FloatArray(buffer.remaining()).also(buffer::get)
}

private fun base64(values: FloatArray): String {
    val buffer = ByteBuffer.allocate(values.size * 4).order(ByteOrder.LITTLE_ENDIAN)
    buffer.asFloatBuffer().put(values)
    return Base64.getEncoder().encodeToString(buffer.array())
}

private fun ints(json: Json) = json.items().map { it.int(-1) }

private fun pixels(value: ByteArray): Map<String, Any?> = mapOf(
    "size" to value.size,
    "sha256" to Manifest.hex(MessageDigest.getInstance("SHA-256").digest(value)),
    "bytes" to if (value.size < 1 shl 20) Base64.getEncoder().encodeToString(value) else null,
)

private fun pin(request: Json): Pin? = request.find("key")?.takeIf { !it.isNull }?.let {
    Pin(PublicKey.read(File(it.string())), request.find("least")?.long() ?: 1)
}

private fun sampling(request: Json) = Sampling(
    request["temperature"].double(), request["top_k"].int(), request["top_p"].double(), request["repetition_penalty"].double(),
)

private fun tree(json: Json): Any? = when (json.kind) {
    "null" -> null
    "true or false" -> json.boolean()
    "an integer" -> json.long()
    "a number" -> mapOf("double" to json.double().toRawBits())
    "a string" -> json.string()
    "a list" -> json.items().map(::tree)
    else -> json.entries().map { (key, item) -> listOf(key, tree(item)) }.let { mapOf("members" to it) }
}

private fun answer(request: Json): Any? = when (val what = request["do"].string()) {
    "classes" -> smolport.classesOfAllCodePoints()
    "tokens" -> tokenizer(request).let { t -> request["texts"].items().map { t.encode(it.string(), request["plain"].boolean()) } }
    "decode" -> tokenizer(request).let { t -> request["ids"].items().map { t.decode(ints(it)) } }
    "stream" -> TextStream(tokenizer(request)).let { stream -> ints(request["ids"]).map(stream::push) }
    "prompt" -> {
        val folder = File(request["folder"].string())
        val encoder = encoders.getOrPut("$folder ${request["per_tile"].int()}") {
            PromptEncoder(Tokenizer.parse(Json.read(File(folder, "tokenizer.json"))), request["per_tile"].int(), "tokenizer.json")
        }
        val turns = request["turns"].items().map { turn ->
            Message(turn["role"].string(), turn["parts"].items().map {
                when (it.kind) {
                    "a string" -> Text(it.string())
                    "a list" -> it.items().let { (rows, cols) -> ImagePart(rows.int(-9), cols.int(-9)) }
                    else -> Text(ints(it["units"]).map { unit -> unit.toChar() }.joinToString(""))
                }
            })
        }
        encoder.encode(turns, request["reply"].boolean(), request["start"].boolean())
    }
    "cut" -> {
        val settings = ImageSettings(
            request["tile"].int(), request["longest_edge"].int(), request["split"].boolean(), request["resize"].boolean(),
            1.0 / 255, listOf(0.5, 0.5, 0.5), listOf(0.5, 0.5, 0.5),
        )
        val tiles = Image.cut(Rgb(request["width"].int(), request["height"].int(), bytes(request["rgb"])), settings)
        pixels(tiles.bytes) + mapOf("rows" to tiles.rows, "cols" to tiles.cols, "count" to tiles.count)
    }
    "resize" -> pixels(
        smolport.Lanczos.resize(
            Rgb(request["width"].int(), request["height"].int(), bytes(request["rgb"])), request["to"].items()[0].int(),
            request["to"].items()[1].int(),
        ).bytes,
    )
    "normalize" -> {
        val settings = ImageSettings.parse(Json.read(File(request["settings"].string())))
        base64(Image.normalize(bytes(request["tiles"]), settings))
    }
    "settings" -> ImageSettings.parse(Json.parse(bytes(request["json"]), "preprocessor_config.json")).run {
        listOf(tileSize, longestEdge, split, resize, factor.toRawBits(), mean.map { it.toRawBits() }, std.map { it.toRawBits() })
    }
    "sizes" -> request["sizes"].items().map {
        val (width, height, edge, tile) = ints(it)
        val (w, h) = Image.resizedSize(width, height, edge)
        Image.gridSize(w, h, tile).let { (gridW, gridH) -> listOf(w, h, gridW, gridH) }
    }
    "upright" -> Rgb(request["width"].int(), request["height"].int(), bytes(request["rgb"])).upright(request["orientation"].int())
        .let { pixels(it.bytes) + mapOf("width" to it.width, "height" to it.height) }
    "on white" -> pixels(Rgb.onWhite(request["width"].int(), request["height"].int(), bytes(request["rgba"])).bytes)
    "scores" -> base64(sampling(request).scores(floats(request["logits"]), ints(request["seen"])))
    "choose" -> sampling(request).choose(floats(request["logits"]), ints(request["seen"]), request["image_id"].int()) {
        request["random"].double()
    }
    "chunks" -> ints(request["tokens"]).map { n -> Chunks.of(n).map { (start, stop) -> listOf(start, stop) } }
    "room" -> request["of"].items().map { Chunks.room(ints(it)[0], ints(it)[1]) }
    "fits" -> Chunks.check(
        ints(request["ids"]), request["past"].int(),
        TextLimits(request["context"].int(), request["vocab"].int(), 1, 1, 1, 1, emptyList(), 0),
    ).let { true }
    "place" -> floats(request["embeds"]).let {
        Chunks.place(floats(request["features"]), it, ints(request["ids"]), request["image_id"].int())
        base64(it)
    }
    "move" -> FloatArray(request["room"].int()).let {
        val from = FloatBuffer.wrap(floats(request["from"]))
        Chunks.move(from, FloatBuffer.wrap(it), request["heads"].int(), request["width"].int(), request["length"].int())
        base64(it)
    }
    "verdict" -> {
        val bundle = Bundle.open(File(request["bundle"].string()))
        val case = Case.read(bundle)[request["case"].int()]
        Verdict.of(case, floats(request["features"]), floats(request["logits"]), Limits.read(bundle)).run {
            mapOf("features" to featuresError.toRawBits(), "logits" to logitsError.toRawBits(), "equal" to equal, "ties" to ties, "faults" to faults)
        }
    }
    "json" -> tree(Json.parse(bytes(request["text"]), "text.json"))
    "tensors" -> SafeTensors(File(request["file"].string())).tensors.map { (name, info) ->
        listOf(name, info.dtype, info.shape, info.offset, info.size)
    }
    "tokenizer" -> Tokenizer.parse(Json.parse(bytes(request["json"]), "tokenizer.json")).let { true }
    "check" -> ArrayList<String>().let { lines ->
        val difference = check(File(request["bundle"].string()), pin(request), request.find("pending")?.boolean() ?: false, lines::add)
        mapOf("lines" to lines, "difference" to difference)
    }
    "graph" -> Bundle.open(File(request["bundle"].string())).graph(request["name"].string()).path
    else -> throw BadInput("unknown request $what")
}

private fun write(out: StringBuilder, value: Any?) {
    when (value) {
        null -> out.append("null")
        is Boolean, is Int, is Long -> out.append(value)
        is String -> {
            out.append('"')
            for (letter in value)
                if (letter < ' ' || letter == '"' || letter == '\\' || letter > '~') out.append("\\u%04x".format(letter.code))
                else out.append(letter)
            out.append('"')
        }
        is List<*> -> value.forEachIndexed { i, item -> out.append(if (i == 0) "[" else ","); write(out, item) }
            .also { out.append(if (value.isEmpty()) "[]" else "]") }
        is Map<*, *> -> value.entries.forEachIndexed { i, (key, item) ->
            out.append(if (i == 0) "{" else ",")
            write(out, key)
            out.append(':')
            write(out, item)
        }.also { out.append(if (value.isEmpty()) "{}" else "}") }
        else -> error("no JSON for $value")
    }
}

fun main() {
    for (line in generateSequence(::readlnOrNull)) {
        val answer = try {
            mapOf("answer" to answer(Json.parse(line.toByteArray(), "request.json")))
        } catch (fault: BadInput) {
            mapOf("error" to fault.message)
        } catch (fault: Exception) {
            mapOf("crash" to "$fault at ${fault.stackTrace.take(4)}")
        } catch (fault: StackOverflowError) {
            mapOf("crash" to "$fault")
        } catch (fault: OutOfMemoryError) {
            mapOf("crash" to "$fault")
        }
        println(StringBuilder().also { write(it, answer) })
    }
}
