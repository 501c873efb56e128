package smolport

/** A letter for each code point but the surrogates: its class to the tokenizer, in capitals where it is a digit too. */
fun classesOfAllCodePoints(): String = buildString {
    for (code in 0..0x10FFFF) {
        if (code in 0xD800..0xDFFF) continue
        val kind = when {
            Unicode.isLetter(code) -> 'l'
            Unicode.isNumber(code) -> 'n'
            Unicode.isSpace(code) -> 's'
            else -> 'o'
        }
        append(if (Unicode.isDigit(code)) kind.uppercaseChar() else kind)
    }
}
