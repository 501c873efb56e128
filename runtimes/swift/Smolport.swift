// What a Core ML bundle takes that needs no Core ML: manifest, prompt, sampling, how tokens go through the decoder.
// Type-checked and run on Linux (Swift 6.0, tests/test_swift.py); never run on an Apple system. FORMAT.md is the contract.

import Foundation

/// What cannot be used: a bundle, a chat. The text names the file, the field, what was found and what is wanted.
public struct BadInput: Error, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

/// The sizes that running a bundle takes, from manifest.json.
public struct Sizes: Decodable, Sendable {
    public struct Image: Decodable, Sendable {
        public let tileSize, longestEdge, maxTiles, tokensPerTile: Int
    }
    public struct Text: Decodable, Sendable {
        public let context, vocab, hidden, layers, kvHeads, headDim: Int
        public let eosIds: [Int]
        public let imageTokenId: Int
    }
    struct Proof: Decodable, Sendable { let state: String }
    let schema, minReader: Int
    let target: String
    let proof: Proof
    public let version: Int
    public let payloadDigest: String
    public let image: Image
    public let text: Text

    /// Reads manifest.json's content. Not covered: signature and digests, which the app checks when it fetches a bundle, and
    /// repeated keys, which Foundation lets pass.
    public static func parse(_ data: Data) throws -> Sizes {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        let sizes: Sizes
        do { sizes = try decoder.decode(Sizes.self, from: data) } catch { throw BadInput("manifest.json: \(error)") }
        guard sizes.minReader <= 3 else { throw BadInput("manifest.json: needs a reader of schema \(sizes.minReader), this one knows 3") }
        guard sizes.target == "coreml" else { throw BadInput("manifest.json: target is \(sizes.target), want coreml") }
        guard sizes.proof.state == "passed" else { throw BadInput("manifest.json: proof is \(sizes.proof.state), want passed") }
        let all = [
            sizes.image.tileSize, sizes.image.tokensPerTile, sizes.text.context, sizes.text.vocab, sizes.text.hidden, sizes.text.layers,
            sizes.text.kvHeads, sizes.text.headDim,
        ]
        guard all.allSatisfy({ (1...(1 << 24)).contains($0) }) else { throw BadInput("manifest.json: a size is not 1 to \(1 << 24)") }
        guard (sizes.text.eosIds + [sizes.text.imageTokenId]).allSatisfy({ (0..<sizes.text.vocab).contains($0) }) else {
            throw BadInput("manifest.json: a token id is not 0 to \(sizes.text.vocab - 1)")
        }
        return sizes
    }
}

/// A part of a message: a text, or the place of an image of so many rows and columns of tiles (0, 0: not split).
public enum Part: Sendable {
    case text(String)
    case image(rows: Int, cols: Int)
}

public struct Message: Sendable {
    public let role: String
    public let parts: [Part]
    public init(role: String, parts: [Part]) { (self.role, self.parts) = (role, parts) }
}

/// A chat in pieces: a text, and whether it is a message's own rather than the format's. Text of a message is to be encoded
/// blind to special tokens; swift-transformers' Tokenizers reads tokenizer.json.
public func chatPieces(_ messages: [Message], tokensPerTile: Int, reply: Bool = true, start: Bool = true) throws -> [(text: String, own: Bool)] {
    let roles = ["user": "User", "assistant": "Assistant", "system": "System"]
    guard !messages.isEmpty else { throw BadInput("a chat without messages") }
    var out: [(text: String, own: Bool)] = start ? [("<|im_start|>", false)] : []
    for message in messages {
        guard let role = roles[message.role] else { throw BadInput("a message's role is \(message.role), want user, assistant or system") }
        guard let first = message.parts.first else { throw BadInput("a \(message.role) message without content") }
        if case .text = first { out.append(("\(role): ", false)) } else { out.append(("\(role):", false)) }
        var text = ""  // neighbouring texts are one: together they may spell what neither does
        for part in message.parts {
            switch part {
            case .text(let own): text += own
            case .image(let rows, let cols):
                guard (rows == 0 && cols == 0) || min(rows, cols) >= 1 else { throw BadInput("an image of \(rows) rows and \(cols) columns of tiles") }
                out.append((text, true))
                out.append((imageString(rows: rows, cols: cols, tokensPerTile: tokensPerTile), false))
                text = ""
            }
        }
        out.append((text, true))
        out.append(("<end_of_utterance>\n", false))
    }
    if reply { out.append(("Assistant:", false)) }
    // literal: a combining mark behind it would hide it from Swift's characters, not from a tokenizer
    for piece in out where piece.own && piece.text.range(of: "<image>", options: .literal) != nil {
        throw BadInput("a message spells the token <image>; give the image as a part")
    }
    return out
}

func imageString(rows: Int, cols: Int, tokensPerTile: Int) -> String {
    let fake = "<fake_token_around_image>"
    let tile = String(repeating: "<image>", count: tokensPerTile)
    let whole = "\(fake)<global-img>\(tile)\(fake)"
    if rows == 0 { return whole }
    let lines = (1...rows).map { r in (1...cols).map { c in "\(fake)<row_\(r)_col_\(c)>\(tile)" }.joined() + "\n" }
    return lines.joined() + "\n" + whole
}

/// One prediction of the decoder: `function` on the tokens [start, start + count), behind `filled` tokens of the cache.
public struct Step: Equatable, Sendable {
    public let function: String  // "prefill" or "decode"
    public let start, count, filled: Int
}

/// How `tokens` are fed to a cache that has `filled`: FORMAT.md, "Core ML packages", steps 5 and 6.
public func steps(tokens: Int, filled: Int, chunk: Int, context: Int) throws -> [Step] {
    guard tokens >= 1, filled >= 0, filled + tokens <= context else {
        throw BadInput("\(tokens) tokens after the \(filled) of the conversation so far do not fit into the context of \(context)")
    }
    var out: [Step] = []
    var at = 0
    while at < tokens {
        let left = tokens - at, position = filled + at
        let fits = left > 1 && position + chunk <= context
        let count = fits ? min(chunk, left) : 1
        out.append(Step(function: count > 1 ? "prefill" : "decode", start: at, count: count, filled: position))
        at += count
    }
    return out
}

/// Logits after repetition penalty, temperature, top-k and top-p; what is ruled out is minus infinity.
public func scores(_ logits: [Float], seen: [Int], temperature: Double, topK: Int, topP: Double, repetitionPenalty: Double) -> [Float] {
    var out = logits
    if repetitionPenalty != 1 {
        let penalty = Float(repetitionPenalty)
        for id in Set(seen) { out[id] = out[id] < 0 ? out[id] * penalty : out[id] / penalty }
    }
    if temperature == 0 { return out }
    out = out.map { $0 / Float(temperature) }
    if topK > 0, topK < out.count {
        let least = out.sorted()[out.count - topK]
        out = out.map { $0 < least ? -.infinity : $0 }  // equal ones stay
    }
    if topP < 1 {
        let order = out.indices.sorted { out[$0] != out[$1] ? out[$0] < out[$1] : $0 < $1 }
        let most = Double(out.max()!)
        let sum = order.reduce(0.0) { $0 + exp(Double(out[$1]) - most) }
        var total = 0.0
        for id in order.dropLast() {
            total += exp(Double(out[id]) - most - log(sum))
            if total <= 1 - topP { out[id] = -.infinity }
        }
    }
    return out
}

/// The token of these scores, never `imageId`. Greedy where `random` is nil; otherwise it is from 0, below 1.
public func choose(_ scores: [Float], imageId: Int, random: Double?) -> Int {
    var scores = scores
    scores[imageId] = -.infinity
    let best = scores.indices.reduce(0) { scores[$1] > scores[$0] ? $1 : $0 }
    guard let random else { return best }
    let chances = scores.map { exp(Double($0) - Double(scores[best])) }
    let total = chances.reduce(0, +)
    var sum = 0.0, last = best
    for (id, chance) in chances.enumerated() where sum + chance > sum {
        sum += chance
        last = id  // the last one where random * total rounds up to total
        if sum > random * total { break }
    }
    return last
}
