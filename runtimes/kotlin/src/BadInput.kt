package smolport

/** What cannot be used: a bundle, an image, a chat. The message names the file, the field, what was found and wanted. */
class BadInput(message: String, cause: Throwable? = null) : Exception(message, cause)

/** [text] on one line, without control characters, at most [most] characters: what comes from a file and goes into a message. */
fun shown(text: String, most: Int = 120): String {
    val plain = text.map { if (it.isISOControl() || it.isSurrogate() || it in '\u2028'..'\u202e') '?' else it }
    return plain.take(most).joinToString("") + if (text.length > most) "..." else ""
}
