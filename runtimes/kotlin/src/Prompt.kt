package smolport

/** A part of a message. */
sealed interface Part

class Text(val text: String) : Part

/** The place of an image; [rows] and [cols] are its [Tiles]' (0, 0: not split). */
class ImagePart(val rows: Int, val cols: Int) : Part {
    init {
        if ((rows != 0 || cols != 0) && minOf(rows, cols) < 1) throw BadInput("an image of $rows rows and $cols columns of tiles")
    }
}

/** One turn: [role] is user, assistant or system. */
class Message(val role: String, val parts: List<Part>)

/**
 * Chat -> token ids.
 *
 * Special tokens come from the format alone: text that spells one is encoded as the characters that it consists of, so
 * that no text can end a turn, open another or pretend to be an image. `<image>` in a text is refused.
 */
class PromptEncoder(private val tokenizer: Tokenizer, private val tokensPerTile: Int, where: String) {
    private val special: List<String> // the longest first
    private val specialIds: Set<Int>

    init {
        for (token in NEEDED)
            if (tokenizer.id(token) == null) throw BadInput("$where: has no token $token, which SmolVLM prompts need")
        special = (tokenizer.special.map { it.content } + NEEDED).distinct().sortedByDescending { it.length }
        specialIds = special.mapNotNull(tokenizer::id).toSet()
    }

    /**
     * Token ids of a chat.
     *
     * @param reply end with the opening of the assistant's turn.
     * @param start begin with the token that opens a chat; false continues one that is in the cache.
     * @throws BadInput for a chat that cannot be, or a text that holds half a character or `<image>`.
     */
    fun encode(messages: List<Message>, reply: Boolean = true, start: Boolean = true): List<Int> {
        val pieces = pieces(messages, reply, start)
        val ids = ArrayList<Int>()
        var run = StringBuilder() // what the tokenizer sees at once
        for ((text, given) in pieces) {
            if (!given) {
                run.append(text)
                continue
            }
            if (IMAGE in text) throw BadInput("a message spells the token $IMAGE; give the image as a part")
            if (hasHalfCharacter(text)) throw BadInput("a message's text cannot be encoded as UTF-8: it has half a character")
            var at = 0
            while (at < text.length) {
                val spelled = special.firstOrNull { text.startsWith(it, at) }
                if (spelled == null) {
                    run.append(text[at++])
                    continue
                }
                ids += tokenizer.encode(run.toString())
                ids += tokenizer.encode(spelled, plain = true)
                run = StringBuilder()
                at += spelled.length
            }
        }
        ids += tokenizer.encode(run.toString())
        // Whatever the tokenizer's rules for added tokens are: no special token beyond those of the format.
        val wanted = tokenizer.encode(pieces.filter { !it.second }.joinToString("") { it.first }).filter { it in specialIds }
        val found = ids.filter { it in specialIds }
        if (found.sorted() != wanted.sorted()) {
            val wrong = (found + wanted).first { id -> found.count { it == id } != wanted.count { it == id } }
            val (given, right) = found.count { it == wrong } to wanted.count { it == wrong }
            throw BadInput("texts give $given tokens ${tokenizer.token(wrong)} where the chat has $right")
        }
        return ids
    }

    /** The chat in pieces: a text, and whether it is a message's own rather than the format's. */
    private fun pieces(messages: List<Message>, reply: Boolean, start: Boolean): List<Pair<String, Boolean>> {
        if (messages.isEmpty()) throw BadInput("a chat without messages")
        val out = ArrayList<Pair<String, Boolean>>()
        if (start) out += START to false
        for (message in messages) {
            val role = ROLES[message.role]
                ?: throw BadInput("a message's role is ${shown(message.role)}, want one of ${ROLES.keys.joinToString()}")
            if (message.parts.isEmpty()) throw BadInput("a ${message.role} message without content")
            out += (if (message.parts[0] is Text) "$role: " else "$role:") to false
            val text = StringBuilder() // neighbouring texts are one: together they may spell what neither does
            for (part in message.parts) {
                when (part) {
                    is Text -> text.append(part.text)
                    is ImagePart -> {
                        out += text.toString() to true
                        out += imageString(part) to false
                        text.clear()
                    }
                }
            }
            out += text.toString() to true
            out += "$END\n" to false
        }
        if (reply) out += "Assistant:" to false
        return out
    }

    private fun imageString(part: ImagePart): String {
        val tile = IMAGE.repeat(tokensPerTile)
        val whole = "$FAKE$GLOBAL$tile$FAKE"
        if (part.rows == 0) return whole
        val lines = (1..part.rows).map { r -> (1..part.cols).joinToString("") { c -> "$FAKE<row_${r}_col_$c>$tile" } }
        return lines.joinToString("") { "$it\n" } + "\n" + whole
    }

    companion object {
        const val FAKE = "<fake_token_around_image>"
        const val IMAGE = "<image>"
        const val GLOBAL = "<global-img>"
        const val START = "<|im_start|>"
        const val END = "<end_of_utterance>"
        private val NEEDED = listOf(FAKE, IMAGE, START, END)
        private val ROLES = mapOf("user" to "User", "assistant" to "Assistant", "system" to "System")

        /** The encoder of a bundle. */
        fun of(bundle: Bundle): PromptEncoder {
            val tokenizer = bundle.json("tokenizer.json")
            val tokens = bundle.json("processor_config.json")["image_seq_len"]
            val perTile = bundle.manifest.image.tokensPerTile
            if (tokens.int() != perTile) throw BadInput("${tokens.where} is ${tokens.int()}, ${Manifest.NAME} says $perTile")
            return PromptEncoder(Tokenizer.parse(tokenizer), perTile, tokenizer.where)
        }

        private fun hasHalfCharacter(text: String): Boolean = text.indices.any {
            val letter = text[it]
            if (letter.isHighSurrogate()) text.getOrNull(it + 1)?.isLowSurrogate() != true
            else letter.isLowSurrogate() && text.getOrNull(it - 1)?.isHighSurrogate() != true
        }
    }
}
