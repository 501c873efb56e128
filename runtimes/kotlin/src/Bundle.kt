package smolport

import java.io.File
import java.io.IOException
import java.nio.file.Files
import java.nio.file.LinkOption.NOFOLLOW_LINKS
import java.nio.file.attribute.BasicFileAttributes
import java.security.MessageDigest

/** A folder whose files were checked against its manifest. Not covered: a change after the check. */
class Bundle private constructor(val folder: File, val manifest: Manifest, val hasEvidence: Boolean) {
    /** The file [name], such as `tokenizer.json`. Throws BadInput if the manifest does not list it. */
    fun file(name: String): File {
        if (manifest.files.none { it.path == name })
            throw BadInput("${File(folder, Manifest.NAME)}: does not list $name, which is needed")
        return File(folder, name)
    }

    fun json(name: String): Json = Json.read(file(name))

    /** The graph [name], such as `vision_encoder`, of an ONNX bundle: its file by the dtype in config.json. */
    fun graph(name: String): File {
        val loading = json("config.json")["transformers.js_config"]["dtype"]
        val dtype = if (loading.isString) loading else loading[name]
        val suffix = SUFFIXES[dtype.string()]
            ?: throw BadInput("${dtype.where} is ${shown(dtype.string())}, want one of ${SUFFIXES.keys}")
        return file("onnx/$name$suffix.onnx")
    }

    companion object {
        private val SUFFIXES = mapOf(
            "fp32" to "", "fp16" to "_fp16", "int8" to "_int8", "uint8" to "_uint8", "q8" to "_quantized", "q4" to "_q4",
            "q4f16" to "_q4f16",
        )

        /**
         * Reads a bundle and checks every file in it. Evidence may be left out, all of it or none.
         *
         * @param pin the key that must have signed it, and its least version; null: neither is asked for.
         * @param allowPending accept a bundle whose proof has not passed.
         * @throws BadInput naming the file that is missing, extra, a link or changed, or the manifest's field.
         */
        fun open(folder: File, pin: Pin? = null, allowPending: Boolean = false): Bundle {
            val path = File(folder, Manifest.NAME)
            val found = LinkedHashMap<String, Long>()
            try {
                list(folder, "", found)
                if (Manifest.NAME !in found) throw BadInput("$path: is missing, so the folder is no bundle")
                if (path.length() > Json.MOST_BYTES) throw BadInput("$path: larger than ${Json.MOST_BYTES} bytes")
                val bytes = path.readBytes() // once: what is checked is what is parsed
                if (pin != null) {
                    val signature = File(folder, Manifest.SIGNATURE)
                    if (signature.length() > 64) throw BadInput("$signature: has ${signature.length()} bytes, want 64")
                    pin.check(bytes, if (Manifest.SIGNATURE in found) signature.readBytes() else null, "$folder")
                }
                val manifest = Manifest.parse(Json.parse(bytes, "$path"))
                if (pin != null && manifest.version < pin.leastVersion)
                    throw BadInput("$path: version is ${manifest.version}, want ${pin.leastVersion} or later")
                if (!manifest.passed && !allowPending)
                    throw BadInput("$path: proof is pending: nothing has shown yet that it computes what its model computes")
                return Bundle(folder, manifest, check(folder, manifest, found))
            } catch (fault: IOException) {
                throw BadInput("$folder: cannot be read: ${fault.message}", fault)
            }
        }

        private fun check(folder: File, manifest: Manifest, found: Map<String, Long>): Boolean {
            val hasEvidence = manifest.files.any { it.evidence && it.path in found }
            val listed = manifest.files.filter { hasEvidence || !it.evidence }
            val names = listed.map { it.path }.toSet() + Manifest.NAME + Manifest.SIGNATURE
            for (entry in listed)
                if (entry.path !in found) throw BadInput("${File(folder, entry.path)}: missing, but listed in ${Manifest.NAME}")
            for (path in found.keys)
                if (path !in names) throw BadInput("${File(folder, shown(path))}: extra, not listed in ${Manifest.NAME}")
            for (entry in listed) {
                val file = File(folder, entry.path)
                val size = found.getValue(entry.path)
                if (size != entry.size) {
                    val what = if (size < entry.size) "truncated" else "too long"
                    throw BadInput("$file: $what: $size bytes, ${Manifest.NAME} says ${entry.size}")
                }
                val digest = digest(file)
                if (digest != entry.sha256)
                    throw BadInput("$file: content has changed: SHA-256 $digest, ${Manifest.NAME} says ${entry.sha256}")
            }
            return hasEvidence
        }

        /** Relative path -> size in bytes of every file below [folder]; a link or special file is refused. */
        private fun list(folder: File, below: String, out: MutableMap<String, Long>, depth: Int = 0) {
            if (depth > 16) throw BadInput("${File(folder, below)}: folders are nested too deeply")
            val at = if (below.isEmpty()) folder else File(folder, below)
            val names = at.list() ?: throw BadInput("$at: is no folder that can be read, so no bundle")
            for (name in names.sorted()) {
                val path = if (below.isEmpty()) name else "$below/$name"
                val about = Files.readAttributes(File(folder, path).toPath(), BasicFileAttributes::class.java, NOFOLLOW_LINKS)
                when {
                    about.isDirectory -> list(folder, path, out, depth + 1)
                    about.isRegularFile -> out[path] = about.size()
                    else -> {
                        val what = if (about.isSymbolicLink) "a symbolic link" else "not a regular file"
                        throw BadInput("${File(folder, path)}: $what, which a bundle may not hold")
                    }
                }
            }
        }

        /** SHA-256 of a file in hex, read in pieces: a decoder has a gigabyte. */
        private fun digest(file: File): String {
            val hash = MessageDigest.getInstance("SHA-256")
            val piece = ByteArray(1 shl 20)
            file.inputStream().use {
                while (true) {
                    val count = it.read(piece)
                    if (count < 0) return Manifest.hex(hash.digest())
                    hash.update(piece, 0, count)
                }
            }
        }
    }
}
