package smolport

import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

/**
 * A value of a JSON file (RFC 8259); [where] names it in errors: `file`, `file: key`, `file: key[3]`.
 *
 * The input is hostile: repeated keys, deep nesting, NaN, bytes that are no UTF-8, halves of surrogate pairs and numbers
 * beyond 64 bits are refused. Android's org.json lets most of them pass.
 */
class Json private constructor(private val value: Any?, val where: String) {
    val isNull get() = value == null
    val isString get() = value is String

    /** A member that must be there. */
    operator fun get(key: String): Json = find(key) ?: throw BadInput("$where: ${shown(key)} is missing")

    /** A member; null where there is none. */
    fun find(key: String): Json? {
        val members = members()
        return if (key in members) Json(members[key], inner(shown(key))) else null
    }

    fun entries(): List<Pair<String, Json>> = members().map { (key, item) -> key to Json(item, inner(shown(key))) }

    fun items(): List<Json> {
        val list = value as? List<*> ?: wrong("a list")
        return list.mapIndexed { i, item -> Json(item, "$where[$i]") }
    }

    fun string(): String = value as? String ?: wrong("a string")

    fun boolean(): Boolean = value as? Boolean ?: wrong("true or false")

    /** An integer from [least] to [most]; 1.0 is none. */
    fun long(least: Long = Long.MIN_VALUE, most: Long = Long.MAX_VALUE): Long {
        val number = value as? Long ?: wrong("an integer")
        if (number !in least..most) throw BadInput("$where is $number, want $least to $most")
        return number
    }

    fun int(least: Int = 0, most: Int = Int.MAX_VALUE): Int = long(least.toLong(), most.toLong()).toInt()

    fun double(): Double = (value as? Double) ?: (value as? Long)?.toDouble() ?: wrong("a number")

    /** The kind of the value, in words. */
    val kind: String
        get() = when (value) {
            null -> "null"
            is Boolean -> "true or false"
            is Long -> "an integer"
            is Double -> "a number"
            is String -> "a string"
            is List<*> -> "a list"
            else -> "an object"
        }

    private fun members(): Map<String, Any?> = (value as? Members)?.map ?: wrong("an object")

    private fun inner(key: String) = if (where.endsWith(".json")) "$where: $key" else "$where.$key"

    private fun wrong(wanted: String): Nothing = throw BadInput("$where is $kind, want $wanted")

    companion object {
        const val MOST_BYTES = 64 shl 20 // of a text, and
        const val MOST_VALUES = 1 shl 20 // values in it: a vocabulary of 49,152 has a quarter of a million
        const val MOST_DEPTH = 64

        /** A JSON file that holds an object. Throws BadInput naming it. */
        fun read(file: File): Json {
            try {
                if (file.length() > MOST_BYTES) throw BadInput("$file: larger than $MOST_BYTES bytes")
                return parse(file.readBytes(), "$file")
            } catch (fault: IOException) {
                throw BadInput("$file: cannot be read: ${fault.message}", fault)
            }
        }

        /** The object in [bytes]; [where] names them in errors. */
        fun parse(bytes: ByteArray, where: String): Json {
            val decoder = Charsets.UTF_8.newDecoder()
                .onMalformedInput(CodingErrorAction.REPORT)
                .onUnmappableCharacter(CodingErrorAction.REPORT)
            val text = try {
                decoder.decode(ByteBuffer.wrap(bytes)).toString()
            } catch (fault: CharacterCodingException) {
                throw BadInput("$where: is not JSON: its bytes are no UTF-8", fault)
            }
            val json = Json(Parser(text, where).document(), where)
            json.members()
            return json
        }
    }

    private class Members(val map: Map<String, Any?>)

    private class Parser(val text: String, val where: String) {
        var at = 0
        var values = 0

        fun fail(what: String): Nothing = throw BadInput("$where: is not JSON: $what at character $at")

        fun space() {
            while (at < text.length && text[at] in " \n\t\r") at++
        }

        fun take(wanted: Char): Boolean = (at < text.length && text[at] == wanted).also { if (it) at++ }

        fun document(): Any? {
            val value = value(0)
            space()
            if (at != text.length) fail("something follows the value")
            return value
        }

        fun value(depth: Int): Any? {
            if (depth > MOST_DEPTH) fail("it is nested too deeply")
            if (++values > MOST_VALUES) fail("it has more than $MOST_VALUES values")
            space()
            return when (text.getOrNull(at)) {
                '{' -> members(depth)
                '[' -> items(depth)
                '"' -> string()
                't' -> word("true", true)
                'f' -> word("false", false)
                'n' -> word("null", null)
                else -> number()
            }
        }

        fun word(letters: String, value: Any?): Any? {
            if (!text.startsWith(letters, at)) fail("an unknown word")
            at += letters.length
            return value
        }

        fun members(depth: Int): Members {
            val out = LinkedHashMap<String, Any?>()
            at++
            space()
            if (take('}')) return Members(out)
            do {
                space()
                if (text.getOrNull(at) != '"') fail("a key is missing")
                val key = string()
                space()
                if (!take(':')) fail("a colon is missing")
                if (key in out) fail("an object repeats the key ${shown(key)}")
                out[key] = value(depth + 1)
                space()
            } while (take(','))
            if (!take('}')) fail("an object does not end")
            return Members(out)
        }

        fun items(depth: Int): List<Any?> {
            val out = ArrayList<Any?>()
            at++
            space()
            if (take(']')) return out
            do {
                out += value(depth + 1)
                space()
            } while (take(','))
            if (!take(']')) fail("a list does not end")
            return out
        }

        fun number(): Any {
            val start = at
            var real = false
            take('-')
            if (!take('0') && !digits()) fail("a value is missing")
            if (take('.')) {
                real = true
                if (!digits()) fail("digits are missing")
            }
            if (take('e') || take('E')) {
                real = true
                if (!take('+')) take('-')
                if (!digits()) fail("digits are missing")
            }
            if (at - start > 400) fail("a number is too long")
            val number = text.substring(start, at)
            if (!real) return number.toLongOrNull() ?: fail("an integer is beyond 64 bits")
            return number.toDouble().also { if (it.isInfinite()) fail("a number is too large") }
        }

        fun digits(): Boolean {
            val start = at
            while (at < text.length && text[at] in '0'..'9') at++
            return at > start
        }

        fun string(): String {
            val out = StringBuilder()
            at++
            while (true) {
                val letter = text.getOrNull(at++) ?: fail("a string does not end")
                when {
                    letter == '"' -> return out.toString()
                    letter < ' ' -> fail("a string holds a control character")
                    letter != '\\' -> out.append(letter)
                    else -> escape(out)
                }
            }
        }

        fun escape(out: StringBuilder) {
            when (text.getOrNull(at++)) {
                '"' -> out.append('"')
                '\\' -> out.append('\\')
                '/' -> out.append('/')
                'b' -> out.append('\b')
                'f' -> out.append('\u000c')
                'n' -> out.append('\n')
                'r' -> out.append('\r')
                't' -> out.append('\t')
                'u' -> {
                    val unit = hex4()
                    out.append(unit)
                    if (unit.isHighSurrogate() && take('\\') && take('u')) {
                        val low = hex4()
                        if (low.isLowSurrogate()) out.append(low) else fail("half of a surrogate pair is missing")
                    } else if (unit.isSurrogate()) {
                        fail("half of a surrogate pair is missing")
                    }
                }
                else -> fail("an unknown escape")
            }
        }

        fun hex4(): Char {
            var value = 0
            repeat(4) {
                val digit = text.getOrNull(at)?.let { if (it < '\u0080') Character.digit(it, 16) else -1 } ?: -1
                if (digit < 0) fail("four hex digits are missing")
                value = value * 16 + digit
                at++
            }
            return value.toChar()
        }
    }
}
