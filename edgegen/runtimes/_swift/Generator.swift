import CoreGraphics
import CoreML
import Foundation

public enum GeneratorError: Error {
    case wrongInput(String)
    case noOutput(String)
    case cannotDraw
}

public struct Output {
    public let image: CGImage?
    /// (index, score) of the five likeliest classes, best first.
    public let classes: [(index: Int, score: Float)]
    public let values: MLMultiArray
}

public final class Generator {
    public let model: MLModel

    /// Load a package, compiling it first where Xcode has not.
    public init(model url: URL, units: MLComputeUnits = .all) async throws {
        let settings = MLModelConfiguration()
        settings.computeUnits = units
        let compiled = url.pathExtension == "mlmodelc" ? url : try await MLModel.compileModel(at: url)
        model = try MLModel(contentsOf: compiled, configuration: settings)
    }

    public func run(image: CGImage) throws -> Output {
        return try run(input: try Generator.feature(image: image))
    }

    /// Networks that start from noise: the same seed gives the same numbers.
    public func run(seed: UInt64) throws -> Output {
        guard Facts.kind == .latent else {
            throw GeneratorError.wrongInput("\(Facts.name) takes an image")
        }
        return try run(input: try Generator.feature(seed: seed))
    }

    public func run(input: MLFeatureValue) throws -> Output {
        let feeds = try MLDictionaryFeatureProvider(dictionary: [Facts.input: input])
        let found = try model.prediction(from: feeds)
        guard let values = found.featureValue(for: Facts.output)?.multiArrayValue else {
            throw GeneratorError.noOutput(Facts.output)
        }
        if Facts.givesClasses {
            return Output(image: nil, classes: Generator.best(values, count: 5), values: values)
        }
        return Output(image: try Images.image(from: values), classes: [], values: values)
    }

    public static func feature(image: CGImage) throws -> MLFeatureValue {
        switch Facts.kind {
        case .image:
            return MLFeatureValue(pixelBuffer: try Images.pixelBuffer(from: image))
        case .pixels:
            return MLFeatureValue(multiArray: try Images.normalised(from: image))
        case .latent:
            throw GeneratorError.wrongInput("\(Facts.name) starts from noise: use run(seed:)")
        }
    }

    public static func feature(seed: UInt64) throws -> MLFeatureValue {
        let array = try MLMultiArray(shape: Facts.shape.map { NSNumber(value: $0) }, dataType: .float32)
        var state = seed &+ 0x9E37_79B9_7F4A_7C15
        func uniform() -> Double {
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            return (Double(state >> 11) + 0.5) / 9_007_199_254_740_992.0
        }
        for index in 0..<array.count {
            let radius = (-2.0 * log(uniform())).squareRoot()
            array[index] = NSNumber(value: Float(radius * cos(2.0 * Double.pi * uniform())))
        }
        return MLFeatureValue(multiArray: array)
    }

    static func best(_ values: MLMultiArray, count: Int) -> [(index: Int, score: Float)] {
        let scores = (0..<values.count).map { (index: $0, score: values[$0].floatValue) }
        return Array(scores.sorted { $0.score > $1.score }.prefix(count))
    }
}
