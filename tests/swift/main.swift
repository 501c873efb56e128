// One request a line of stdin, one answer a line of stdout, both JSON: what tests/test_swift.py asks of Smolport.swift.

import Foundation

func answer(_ request: [String: Any]) throws -> Any {
    switch request["do"] as! String {
    case "sizes":
        let sizes = try Sizes.parse(Data(contentsOf: URL(fileURLWithPath: request["file"] as! String)))
        return [sizes.image.tileSize, sizes.image.tokensPerTile, sizes.text.context, sizes.text.vocab, sizes.text.imageTokenId]
    case "chat":
        let messages = (request["turns"] as! [[String: Any]]).map { turn in
            Message(role: turn["role"] as! String, parts: (turn["parts"] as! [Any]).map { part in
                if let text = part as? String { return .text(text) }
                let grid = part as! [Int]
                return .image(rows: grid[0], cols: grid[1])
            })
        }
        let pieces = try chatPieces(
            messages, tokensPerTile: request["per_tile"] as! Int, reply: request["reply"] as! Bool, start: request["start"] as! Bool)
        return pieces.map { $0.text }.joined()
    case "steps":
        return try steps(
            tokens: request["tokens"] as! Int, filled: request["filled"] as! Int, chunk: request["chunk"] as! Int,
            context: request["context"] as! Int
        ).map { [$0.function, $0.start, $0.count, $0.filled] as [Any] }
    case "scores":
        let found = scores(
            (request["logits"] as! [Double]).map { Float($0) }, seen: request["seen"] as! [Int],
            temperature: request["temperature"] as! Double, topK: request["top_k"] as! Int, topP: request["top_p"] as! Double,
            repetitionPenalty: request["repetition_penalty"] as! Double)
        let token = choose(found, imageId: request["image_id"] as! Int, random: request["random"] as? Double)
        return ["scores": found.map { $0.bitPattern }, "token": token] as [String: Any]
    default:
        throw BadInput("unknown request")
    }
}

while let line = readLine() {
    var reply: [String: Any]
    do {
        let request = try JSONSerialization.jsonObject(with: Data(line.utf8)) as! [String: Any]
        reply = ["answer": try answer(request)]
    } catch {
        reply = ["error": "\(error)"]
    }
    FileHandle.standardOutput.write(try JSONSerialization.data(withJSONObject: reply) + Data("\n".utf8))
}
