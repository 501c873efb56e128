package smolport

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A tensor of a file: its data are [size] bytes at [offset] from the file's start. */
class TensorInfo(val dtype: String, val shape: List<Long>, val offset: Long, val size: Long)

/**
 * Named tensors in a file: the safetensors format, of which only the header is held.
 *
 * u64 length of the header | header: JSON, {name: {dtype, shape, data_offsets}} | data. Every byte behind the header
 * belongs to exactly one tensor. Throws BadInput if the header lies about the file.
 */
class SafeTensors(private val file: File) {
    val tensors: Map<String, TensorInfo>

    init {
        val size: Long
        val header: ByteArray
        try {
            RandomAccessFile(file, "r").use {
                size = it.length()
                if (size < 8) throw BadInput("$file: is truncated or no safetensors file: $size bytes")
                val length = java.lang.Long.reverseBytes(it.readLong())
                if (length < 0 || length > size - 8)
                    throw BadInput("$file: is truncated or no safetensors file: $size bytes, header of $length")
                if (length > Json.MOST_BYTES)
                    throw BadInput("$file: has a header of $length bytes, want at most ${Json.MOST_BYTES}")
                header = ByteArray(length.toInt())
                it.readFully(header)
            }
        } catch (fault: IOException) {
            throw BadInput("$file: cannot be read: ${fault.message}", fault)
        }
        val start = 8L + header.size
        val found = Json.parse(header, "$file").entries().filter { it.first != "__metadata__" }
            .map { (name, entry) -> name to info(entry, start) }
            .sortedWith(compareBy({ it.second.offset }, { it.second.size }))
        var end = start
        for ((name, info) in found) {
            if (info.offset != end) {
                val what = if (info.offset < end) "overlaps" else "leaves a hole behind"
                throw BadInput("$file: ${shown(name)} $what what is before it: starts at byte ${info.offset}, want $end")
            }
            end += info.size
        }
        if (end != size) {
            val what = if (end > size) "is truncated" else "has bytes that no tensor owns"
            throw BadInput("$file: $what: $size bytes, its tensors end at $end")
        }
        tensors = found.toMap()
    }

    /** The tensor [name] as bytes, after checking its dtype and shape; -1 in [shape] stands for any length. */
    fun bytes(name: String, dtype: String, vararg shape: Long): ByteArray {
        val info = tensors[name] ?: throw BadInput("$file: has no tensor ${shown(name)}")
        val fits = info.shape.size == shape.size && shape.indices.all { shape[it] == -1L || shape[it] == info.shape[it] }
        if (info.dtype != dtype || !fits)
            throw BadInput("$file: ${shown(name)} is ${info.dtype} ${info.shape}, want $dtype ${shape.toList()}")
        if (info.size > Int.MAX_VALUE - 8) throw BadInput("$file: ${shown(name)} has ${info.size} bytes, too many to read")
        try {
            RandomAccessFile(file, "r").use {
                it.seek(info.offset)
                return ByteArray(info.size.toInt()).also(it::readFully)
            }
        } catch (fault: IOException) {
            throw BadInput("$file: ${shown(name)} cannot be read: ${fault.message}", fault)
        }
    }

    fun floats(name: String, vararg shape: Long): FloatArray {
        val buffer = ByteBuffer.wrap(bytes(name, "F32", *shape)).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
        return FloatArray(buffer.remaining()).also(buffer::get)
    }

    private fun info(entry: Json, start: Long): TensorInfo {
        val keys = entry.entries().map { it.first }.toSet()
        if (keys != setOf("dtype", "shape", "data_offsets"))
            throw BadInput("${entry.where} has ${shown("$keys")}, want dtype, shape and data_offsets")
        val dtype = entry["dtype"].string()
        val item = ITEM_BYTES[dtype] ?: throw BadInput("${entry.where}: dtype ${shown(dtype)} is unknown")
        val shape = entry["shape"].items().map { it.long(0) }
        if (shape.size > 8) throw BadInput("${entry.where} has ${shape.size} dimensions, want at most 8")
        val offsets = entry["data_offsets"].items().map { it.long(0, Long.MAX_VALUE - start) }
        if (offsets.size != 2 || offsets[0] > offsets[1])
            throw BadInput("${entry.where} has data_offsets ${shown("$offsets")}, want [start, end]")
        val size = try {
            if (0L in shape) 0 else shape.fold(item, Math::multiplyExact)
        } catch (fault: ArithmeticException) {
            throw BadInput("${entry.where} is $dtype $shape, more than there can be", fault)
        }
        if (size != offsets[1] - offsets[0])
            throw BadInput("${entry.where} is $dtype $shape in ${offsets[1] - offsets[0]} bytes, want $size")
        return TensorInfo(dtype, shape, start + offsets[0], size)
    }

    private companion object {
        val ITEM_BYTES: Map<String, Long> = mapOf(
            "F64" to 8L, "I64" to 8L, "U64" to 8L, "F32" to 4L, "I32" to 4L, "U32" to 4L, "F16" to 2L, "BF16" to 2L, "I16" to 2L,
            "U16" to 2L, "I8" to 1L, "U8" to 1L, "BOOL" to 1L, "F8_E4M3" to 1L, "F8_E5M2" to 1L,
        )
    }
}
