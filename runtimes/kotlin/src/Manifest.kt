package smolport

import java.security.MessageDigest
import java.text.Normalizer
import java.util.Locale

/** A file of a bundle; [path] is relative, with forward slashes. */
class Entry(val path: String, val size: Long, val sha256: String, val evidence: Boolean)

/** How images become tokens; sizes in pixels. */
class ImageLimits(val tileSize: Int, val longestEdge: Int, val maxTiles: Int, val tokensPerTile: Int)

/** The decoder's sizes; [context] is the most tokens that prompt and answer have together. */
class TextLimits(
    val context: Int,
    val vocab: Int,
    val hidden: Int,
    val layers: Int,
    val kvHeads: Int,
    val headDim: Int,
    val eosIds: List<Int>,
    val imageTokenId: Int,
)

/** What running a bundle takes of manifest.json; FORMAT.md says what each field means. */
class Manifest(
    val target: String,
    val model: String,
    val version: Long,
    val leastEngine: String,
    val image: ImageLimits,
    val text: TextLimits,
    val files: List<Entry>,
    val payloadDigest: String,
    val passed: Boolean,
    val notes: List<String>,
) {
    companion object {
        const val NAME = "manifest.json"
        const val SIGNATURE = "manifest.json.sig" // beside it where the bundle is signed; the manifest does not list it
        const val HALF = ".manifest.json.partial" // what an interrupted export may leave
        const val SCHEMA = 3L // the newest that this reader knows
        private const val MOST = 1 shl 24 // of any size: products of two of them stay in range

        /** The manifest in [json]. Throws BadInput for a missing field, a wrong type or an impossible value. */
        fun parse(json: Json): Manifest {
            val schema = json["schema"].long(1)
            val least = json["min_reader"].long(1, schema)
            if (least > SCHEMA) throw BadInput("${json.where}: needs a reader of schema $least, this one knows $SCHEMA")
            val target = json["target"].string()
            if (target != "onnx" && target != "coreml")
                throw BadInput("${json["target"].where} is ${shown(target)}, want onnx or coreml")
            val state = json["proof"]["state"].string()
            if (state != "pending" && state != "passed")
                throw BadInput("${json["proof"]["state"].where} is ${shown(state)}, want pending or passed")
            val files = json["files"].items().map(::entry)
            checkNames(files, json["files"].where)
            val report = json["proof"]["report"]
            if (!report.isNull && files.none { it.path == report.string() })
                throw BadInput("${report.where} is ${shown(report.string())}, want a file that the manifest lists")
            val digest = json["payload_digest"].string()
            val found = digestOf(files)
            if (digest != found)
                throw BadInput("${json["payload_digest"].where} is ${shown(digest)}, want $found by the files listed")
            return Manifest(
                target = target,
                model = json["model"]["name"].string(),
                version = json["version"].long(1),
                leastEngine = json["engine"]["least"].string(),
                image = imageLimits(json["image"]),
                text = textLimits(json["text"]),
                files = files,
                payloadDigest = digest,
                passed = state == "passed",
                notes = if (schema < 2) emptyList() else json["notes"].items().map { it.string() },
            )
        }

        /** SHA-256 over the lines "path<TAB>size<TAB>sha256<LF>" of the payload files, sorted by code points. */
        fun digestOf(files: List<Entry>): String {
            val lines = files.filter { !it.evidence }.map { "${it.path}\t${it.size}\t${it.sha256}\n".toByteArray() }
            val hash = MessageDigest.getInstance("SHA-256")
            lines.sortedWith(::compareBytes).forEach(hash::update) // bytes of UTF-8 sort as code points, UTF-16 does not
            return hex(hash.digest())
        }

        fun hex(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(Locale.ROOT, it) }

        private fun compareBytes(a: ByteArray, b: ByteArray): Int {
            for (i in 0 until minOf(a.size, b.size)) {
                val order = (a[i].toInt() and 255) - (b[i].toInt() and 255)
                if (order != 0) return order
            }
            return a.size - b.size
        }

        private fun imageLimits(json: Json) = ImageLimits(
            tileSize = json["tile_size"].int(1, Image.MAX_EDGE),
            longestEdge = json["longest_edge"].int(1, MOST),
            maxTiles = json["max_tiles"].int(1, MOST),
            tokensPerTile = json["tokens_per_tile"].int(1, 1 shl 16),
        )

        private fun textLimits(json: Json): TextLimits {
            val vocab = json["vocab"].int(2, MOST) // the image's token is never chosen
            return TextLimits(
                context = json["context"].int(1, MOST),
                vocab = vocab,
                hidden = json["hidden"].int(1, 1 shl 16),
                layers = json["layers"].int(1, 1 shl 10),
                kvHeads = json["kv_heads"].int(1, 1 shl 10),
                headDim = json["head_dim"].int(1, 1 shl 12),
                eosIds = json["eos_ids"].items().map { it.int(0, vocab - 1) },
                imageTokenId = json["image_token_id"].int(0, vocab - 1),
            )
        }

        private fun entry(json: Json): Entry {
            val path = json["path"].string()
            if (!isSafe(path))
                throw BadInput("${json["path"].where} is ${shown(path)}, want one below the bundle, with forward slashes")
            val sha256 = json["sha256"].string()
            if (!Regex("[0-9a-f]{64}").matches(sha256))
                throw BadInput("${json["sha256"].where} is ${shown(sha256)}, want 64 hex digits")
            val role = json["role"].string()
            if (role != "payload" && role != "evidence")
                throw BadInput("${json["role"].where} is ${shown(role)}, want payload or evidence")
            return Entry(path, json["size"].long(0), sha256, role == "evidence")
        }

        private fun isSafe(path: String): Boolean {
            val parts = path.split('/')
            return path.codePoints().allMatch(::isPrintable) && '\\' !in path && ':' !in path &&
                parts.none { it.isEmpty() || it == "." || it == ".." } &&
                key(path) !in setOf(NAME, HALF, SIGNATURE)
        }

        /** No control or format character, surrogate, unassigned code point, or separator but the space. */
        private fun isPrintable(code: Int): Boolean = when (Character.getType(code).toByte()) {
            Character.CONTROL, Character.FORMAT, Character.SURROGATE, Character.PRIVATE_USE, Character.UNASSIGNED,
            Character.LINE_SEPARATOR, Character.PARAGRAPH_SEPARATOR -> false
            Character.SPACE_SEPARATOR -> code == ' '.code
            else -> true
        }

        /** Equal for names that some file system takes for one: case, and composed or decomposed letters. */
        private fun key(path: String): String =
            Normalizer.normalize(path, Normalizer.Form.NFC).uppercase(Locale.ROOT).lowercase(Locale.ROOT)

        /** No path twice, none a file and a folder, each folder spelled in one way. */
        private fun checkNames(files: List<Entry>, where: String) {
            val seen = HashSet<String>()
            for (file in files)
                if (!seen.add(key(file.path))) throw BadInput("$where: lists ${file.path} twice")
            val folders = HashMap<String, String>()
            for (file in files) {
                for (end in file.path.indices.filter { file.path[it] == '/' }) {
                    val folder = file.path.substring(0, end)
                    if (key(folder) in seen) throw BadInput("$where: $folder is a file, and a folder in ${file.path}")
                    val spelled = folders.getOrPut(key(folder)) { folder }
                    if (spelled != folder) throw BadInput("$where: ${file.path} has a folder that is spelled $spelled elsewhere")
                }
            }
        }
    }
}
