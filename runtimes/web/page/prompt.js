// Chat -> token ids, equal to runtimes/prompt.py: special tokens come from the format alone. Text that spells one is
// encoded as the characters that it consists of, so that no question can end a turn or pretend to be an image.

const FAKE = "<fake_token_around_image>", IMAGE = "<image>", GLOBAL = "<global-img>";
const START = "<|im_start|>", END = "<end_of_utterance>";

export class PromptError extends Error {}

/**
 * The chat in pieces [text, whether it is a message's own]. `messages` are { role, parts }, a part being a text or
 * the grid { rows, cols } of an image (0, 0: not split).
 */
function* chatPieces(messages, seqLen) {
  yield [START, false];
  for (const { role, parts } of messages) {
    const begin = typeof parts[0] === "string" ? ": " : ":";
    yield [role[0].toUpperCase() + role.slice(1) + begin, false];
    let text = ""; // neighbouring texts are one: together they may spell what neither does
    for (const part of parts) {
      if (typeof part === "string") {
        text += part;
        continue;
      }
      yield [text, true];
      yield [imageText(part, seqLen), false];
      text = "";
    }
    yield [text, true];
    yield [`${END}\n`, false];
  }
  yield ["Assistant:", false];
}

function imageText({ rows, cols }, seqLen) {
  const image = IMAGE.repeat(seqLen);
  const whole = `${FAKE}${GLOBAL}${image}${FAKE}`;
  if (rows === 0 && cols === 0) return whole;
  let text = "";
  for (let r = 1; r <= rows; r++) {
    for (let c = 1; c <= cols; c++) text += `${FAKE}<row_${r}_col_${c}>${image}`;
    text += "\n";
  }
  return `${text}\n${whole}`;
}

export class PromptEncoder {
  /**
   * @param Tokenizer transformers.js' PreTrainedTokenizer
   * @param tokenizer, config the content of tokenizer.json and tokenizer_config.json
   * @param seqLen image tokens a tile
   */
  constructor(Tokenizer, tokenizer, config, seqLen) {
    this.seqLen = seqLen;
    const special = tokenizer.added_tokens.filter((t) => t.special || [FAKE, IMAGE, START, END].includes(t.content));
    for (const token of [FAKE, IMAGE, START, END])
      if (!special.some((t) => t.content === token)) throw new PromptError(`tokenizer.json: has no token ${token}`);
    this.special = special.map((t) => t.content).sort((a, b) => b.length - a.length);
    this.specialIds = new Set(special.map((t) => t.id));
    this.tokenizer = new Tokenizer(tokenizer, config);
    const others = tokenizer.added_tokens.filter((t) => !special.includes(t));
    this.plain = new Tokenizer({ ...tokenizer, added_tokens: others }, config); // blind to special tokens
  }

  /** Token ids of a chat, the opening of the reply included. Throws where a text spells the image token. */
  encode(messages) {
    const pieces = [...chatPieces(messages, this.seqLen)];
    const ids = [];
    let run = "";
    for (const [text, given] of pieces) {
      if (!given) {
        run += text;
        continue;
      }
      if (text.includes(IMAGE)) throw new PromptError(`The question must not contain ${IMAGE}.`);
      if (text.isWellFormed?.() === false) throw new PromptError("The question holds half a character.");
      let done = 0;
      for (const [at, token] of this.#spelled(text)) {
        ids.push(...ask(this.tokenizer, run + text.slice(done, at)), ...ask(this.plain, token));
        run = "";
        done = at + token.length;
      }
      run += text.slice(done);
    }
    ids.push(...ask(this.tokenizer, run));
    // Whatever the tokenizer's rules are: no special token beyond those of the format.
    const format = pieces.filter(([, given]) => !given).map(([text]) => text);
    const count = (list) => list.filter((id) => this.specialIds.has(id)).length;
    if (count(ids) !== count(ask(this.tokenizer, format.join(""))))
      throw new PromptError("The question gives special tokens.");
    return ids;
  }

  *#spelled(text) {
    for (let at = 0; at < text.length; ) {
      const token = this.special.find((t) => text.startsWith(t, at));
      if (token) yield [at, token];
      at += token ? token.length : 1;
    }
  }

  /** Text of token ids, special tokens left out. */
  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}

function ask(tokenizer, text) {
  return text ? tokenizer.encode(text, { add_special_tokens: false }) : [];
}

/** Tokens in, whole characters out: what is not a character yet waits for the tokens that end it. */
export class TextStream {
  #decode;
  #ids = []; // since the last place where the text so far was whole
  #sent = 0; // characters of them that were given out

  constructor(decode) {
    this.#decode = decode;
  }

  push(id) {
    this.#ids.push(id);
    const text = this.#decode(this.#ids);
    // Bytes that may begin a character decode to one replacement at the end; all before it stays as it is.
    const whole = !text.endsWith("\ufffd");
    const piece = text.slice(this.#sent, whole ? undefined : -1);
    this.#sent += piece.length;
    if (whole) {
      this.#ids = [];
      this.#sent = 0;
    }
    return piece;
  }
}
