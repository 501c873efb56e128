// UNVERIFIED: a sample that has never been compiled or run; it needs iOS 18 or macOS 15. Smolport.swift beside it is tested.
// The contract is FORMAT.md, "Core ML packages"; that both functions of the decoder take one state is an assumption.

#if canImport(CoreML)
import CoreML
import Foundation

/// The packages of a bundle in Core ML, and the state of one conversation. One thread at a time.
@available(iOS 18, macOS 15, *)
public final class Device {
    private let sizes: Sizes
    private let vision, prefill, decode: MLModel
    private let chunk: Int
    private let table: (Int) throws -> [Float]
    private var state: MLState
    /// Tokens in the cache.
    public private(set) var filled = 0

    /// - Parameters:
    ///   - compiled: the folder with VisionEncoder.mlmodelc and Decoder.mlmodelc, made once by `MLModel.compileModel(at:)`.
    ///   - embedding: a row of embed_tokens.safetensors, dequantized: FORMAT.md has the layout, by `recipe.tensors`.
    public init(compiled: URL, sizes: Sizes, embedding: @escaping (Int) throws -> [Float]) throws {
        func load(_ name: String, _ function: String?) throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = .cpuAndGPU
            configuration.functionName = function
            return try MLModel(contentsOf: compiled.appendingPathComponent(name), configuration: configuration)
        }
        (self.sizes, table) = (sizes, embedding)
        vision = try load("VisionEncoder.mlmodelc", nil)
        prefill = try load("Decoder.mlmodelc", "prefill")
        decode = try load("Decoder.mlmodelc", "decode")
        let shape = prefill.modelDescription.inputDescriptionsByName["inputs_embeds"]?.multiArrayConstraint?.shape
        guard let shape, shape.count == 3, shape[1].intValue >= 2 else { throw BadInput("Decoder: prefill takes no inputs_embeds [1, T, hidden]") }
        chunk = shape[1].intValue
        state = prefill.makeState()
    }

    /// One tile f32 [3, S, S] -> features f32 [L, hidden].
    public func encode(tile: [Float]) throws -> [Float] {
        let side = sizes.image.tileSize
        let found = try vision.prediction(from: features(["pixel_values": half(tile, [1, 3, side, side])]))
        return try floats(found, "image_features", sizes.image.tokensPerTile * sizes.text.hidden)
    }

    /// Feeds tokens; `rows` are the features of the image tokens among them, in order. The logits after the last.
    public func extend(_ ids: [Int], rows: [Float] = []) throws -> [Float] {
        let hidden = sizes.text.hidden
        guard ids.filter({ $0 == sizes.text.imageTokenId }).count * hidden == rows.count || rows.isEmpty else {
            throw BadInput("image features have \(rows.count) numbers, want \(hidden) an image token")
        }
        var embeds: [[Float]] = [], used = 0
        for id in ids {
            if id == sizes.text.imageTokenId, !rows.isEmpty {
                embeds.append(Array(rows[used..<used + hidden]))
                used += hidden
            } else {
                embeds.append(try table(id))
            }
        }
        var logits: [Float] = []
        for step in try steps(tokens: ids.count, filled: filled, chunk: chunk, context: sizes.text.context) {
            logits = try run(step, Array(embeds[step.start..<step.start + step.count].joined()))
        }
        filled += ids.count
        return logits
    }

    /// Begins a new conversation. After a prediction that gave infinity or NaN make a new state: the mask does not hide those.
    public func clear(spoiled: Bool = false) {
        if spoiled { state = prefill.makeState() }
        filled = 0
    }

    private func run(_ step: Step, _ embeds: [Float]) throws -> [Float] {
        let rows = step.function == "prefill" ? chunk : 1
        let (hidden, context) = (sizes.text.hidden, sizes.text.context)
        let padded = embeds + [Float](repeating: 0, count: rows * hidden - embeds.count)
        var mask = [Float](repeating: -30000, count: rows * context)
        for row in 0..<rows { for column in 0...min(step.filled + row, context - 1) { mask[row * context + column] = 0 } }
        var inputs = [
            "inputs_embeds": try half(padded, [1, rows, hidden]),
            "attention_mask": try half(mask, [1, 1, rows, context]),
            "position": try integer(step.filled),
        ]
        if rows > 1 { inputs["last_row"] = try integer(step.count - 1) }
        let found = try (rows > 1 ? prefill : decode).prediction(from: features(inputs), using: state)
        let logits = try floats(found, "logits", sizes.text.vocab)
        guard logits.allSatisfy(\.isFinite) else { throw BadInput("logits hold NaN or infinity: begin with a new state") }
        return logits
    }

    private func features(_ arrays: [String: MLMultiArray]) throws -> MLDictionaryFeatureProvider {
        try MLDictionaryFeatureProvider(dictionary: arrays.mapValues { MLFeatureValue(multiArray: $0) })
    }

    private func half(_ values: [Float], _ shape: [Int]) throws -> MLMultiArray {
        let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float16)
        array.withUnsafeMutableBufferPointer(ofType: Float16.self) { buffer, _ in
            for (i, value) in values.enumerated() { buffer[i] = Float16(value) }
        }
        return array
    }

    private func integer(_ value: Int) throws -> MLMultiArray {
        let array = try MLMultiArray(shape: [1], dataType: .int32)
        array[0] = NSNumber(value: Int32(value))
        return array
    }

    private func floats(_ found: MLFeatureProvider, _ name: String, _ count: Int) throws -> [Float] {
        guard let array = found.featureValue(for: name)?.multiArrayValue, array.count == count else {
            throw BadInput("\(name): the engine gives none, or not \(count) numbers")
        }
        return (0..<count).map { array[$0].floatValue }
    }
}
#endif
