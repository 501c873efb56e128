package smolport

import kotlin.math.abs
import kotlin.math.sqrt

/** One golden case: what goes in and what the reference made of it. FORMAT.md, "Golden cases". */
class Case(
    val name: String,
    val turns: List<Message>, // with the case's grids in the places of its images
    val longestEdge: Int,
    val grids: List<Pair<Int, Int>>,
    val ids: List<Int>,
    val tokens: List<Int>,
    private val data: SafeTensors,
    private val manifest: Manifest,
) {
    private val tileSize = manifest.image.tileSize.toLong()
    private val tileCount = grids.sumOf { (rows, cols) -> rows * cols + 1L }

    fun image(i: Int): Rgb {
        val shape = data.tensors["$name.image.$i"]?.shape ?: emptyList()
        if (shape.size != 3 || shape.any { it > Int.MAX_VALUE })
            throw BadInput("case ${shown(name)}: image $i has shape $shape, want [H, W, 3]")
        return Rgb(shape[1].toInt(), shape[0].toInt(), data.bytes("$name.image.$i", "U8", -1, -1, 3))
    }

    /** u8 [N, S, S, 3] of all images. */
    fun tiles(): ByteArray = data.bytes("$name.tiles", "U8", tileCount, tileSize, tileSize, 3)

    /** f32 [N, L, hidden]. */
    fun features(): FloatArray = data.floats(
        "$name.features", tileCount, manifest.image.tokensPerTile.toLong(), manifest.text.hidden.toLong(),
    )

    /** f32 [tokens, vocab]: row i predicts token i. */
    fun logits(): FloatArray = data.floats("$name.logits", tokens.size.toLong(), manifest.text.vocab.toLong())

    companion object {
        /** The golden cases of a bundle. Throws BadInput naming the file and what is wrong in it. */
        fun read(bundle: Bundle): List<Case> {
            val data = SafeTensors(bundle.file("cases/cases.safetensors"))
            val rows = bundle.json("cases/cases.json")["cases"]
            val cases = rows.items().map { case(it, data, bundle.manifest) }
            if (cases.isEmpty()) throw BadInput("${rows.where}: holds no case")
            return cases
        }

        private fun case(json: Json, data: SafeTensors, manifest: Manifest): Case {
            fun ids(key: String) = json[key].items().map { it.int(0, manifest.text.vocab - 1) }
            val grids = json["grids"].items().map { grid ->
                val sides = grid.items().map { it.int(0, Image.MAX_EDGE) }
                if (sides.size != 2) throw BadInput("${grid.where} has ${sides.size} numbers, want rows and columns")
                sides[0] to sides[1]
            }
            val left = grids.iterator()
            val turns = json["turns"].items().map { turn ->
                Message(turn["role"].string(), turn["parts"].items().map { part ->
                    if (!part.isNull) Text(part.string())
                    else if (left.hasNext()) left.next().let { (rows, cols) -> ImagePart(rows, cols) }
                    else throw BadInput("${part.where} is an image without a grid")
                })
            }
            if (left.hasNext()) throw BadInput("${json["grids"].where}: more grids than images in turns")
            val case = Case(
                json["name"].string(), turns, json["longest_edge"].int(1, Image.MAX_EDGE * 4), grids, ids("ids"), ids("tokens"),
                data, manifest,
            )
            if (case.ids.isEmpty() || case.tokens.isEmpty()) throw BadInput("${json.where}: has no ids, or no tokens")
            return case
        }
    }
}

/** What of a case must be equal: pixels, grids and ids. */
class Inputs(bundle: Bundle) {
    private val settings = ImageSettings.parse(bundle.json("preprocessor_config.json"))
    private val encoder = PromptEncoder.of(bundle)

    init {
        val tile = bundle.manifest.image.tileSize
        if (settings.tileSize != tile)
            throw BadInput("preprocessor_config.json: tile size is ${settings.tileSize}, ${Manifest.NAME} says $tile")
    }

    /** The first difference between a case and what this port makes of it, in words; null where there is none. */
    fun difference(case: Case): String? {
        val cut = case.grids.indices.map { Image.cut(case.image(it), settings.withLongestEdge(case.longestEdge, settings.resize)) }
        for ((i, tiles) in cut.withIndex())
            if (tiles.rows to tiles.cols != case.grids[i])
                return "tile grid of image $i is ${tiles.rows} x ${tiles.cols}, want ${case.grids[i].first} x ${case.grids[i].second}"
        val wanted = case.tiles()
        val found = ByteArray(wanted.size)
        var end = 0
        for (tiles in cut) {
            tiles.bytes.copyInto(found, end)
            end += tiles.bytes.size
        }
        wanted.indices.firstOrNull { wanted[it] != found[it] }?.let {
            val side = settings.tileSize
            val place = "tile ${it / (side * side * 3)}, row ${it / (side * 3) % side}, column ${it / 3 % side}, channel ${it % 3}"
            return "pixel at $place is ${found[it].toInt() and 255}, want ${wanted[it].toInt() and 255}"
        }
        val ids = encoder.encode(case.turns)
        if (ids.size != case.ids.size) return "prompt has ${ids.size} ids, want ${case.ids.size}"
        val at = ids.indices.firstOrNull { ids[it] != case.ids[it] } ?: return null
        return "id $at of the prompt is ${ids[at]}, want ${case.ids[at]}"
    }
}

/** How far an engine's outputs may be from the cases: report.json's `verify_limits`, relative L2. */
class Limits(val features: Double, val logits: Double) {
    companion object {
        fun read(bundle: Bundle): Limits {
            val report = bundle.json("report.json")
            val of = report["payload_digest"].string()
            if (of != bundle.manifest.payloadDigest)
                throw BadInput("${report.where}: is the proof of payload ${shown(of)}, this one is ${bundle.manifest.payloadDigest}")
            return report["verify_limits"].let { Limits(it["features"].double(), it["logits"].double()) }
        }
    }
}

/** The judgement of an engine's outputs for a case; [faults] is empty where it passed. */
class Verdict(val featuresError: Double, val logitsError: Double, val equal: Int, val ties: Int, val faults: List<String>) {
    companion object {
        private const val TIE_WIDTH = 4.0 // FORMAT.md, "Golden cases", 5

        /** Compares [features] and [logits], shaped as in [case], of which the tokens were fed one by one. */
        fun of(case: Case, features: FloatArray, logits: FloatArray, limits: Limits): Verdict {
            val vocab = case.logits().size / case.tokens.size
            val wanted = case.logits()
            val featuresError = relativeError(features, case.features())
            val logitsError = relativeError(logits, wanted)
            val faults = ArrayList<String>()
            if (!(featuresError <= limits.features))
                faults += "relative error of image features is $featuresError, want at most ${limits.features}"
            if (!(logitsError <= limits.logits)) {
                faults += "relative error of logits is $logitsError, want at most ${limits.logits}"
                return Verdict(featuresError, logitsError, 0, 0, faults)
            }
            var equal = 0
            var ties = 0
            for ((i, token) in case.tokens.withIndex()) {
                val row = wanted.copyOfRange(i * vocab, (i + 1) * vocab)
                val found = logits.copyOfRange(i * vocab, (i + 1) * vocab)
                val best = Sampling.best(found)
                val width = TIE_WIDTH * limits.logits * sqrt(row.sumOf { it.toDouble() * it } / vocab)
                if (best == token) equal++
                else if (abs(row[token].toDouble() - row[best]) <= width) ties++
                else faults += "greedy token $i is $best, want $token"
            }
            return Verdict(featuresError, logitsError, equal, ties, faults)
        }

        /** |found - wanted| / |wanted| in L2; infinite where something is not finite or sizes differ. */
        fun relativeError(found: FloatArray, wanted: FloatArray): Double {
            if (found.size != wanted.size || found.any { !it.isFinite() }) return Double.POSITIVE_INFINITY
            if (wanted.isEmpty()) return 0.0
            var difference = 0.0
            var whole = 0.0
            for (i in wanted.indices) {
                difference += (found[i].toDouble() - wanted[i]).let { it * it }
                whole += wanted[i].toDouble() * wanted[i]
            }
            return sqrt(difference) / maxOf(sqrt(whole), 1e-30)
        }
    }
}
