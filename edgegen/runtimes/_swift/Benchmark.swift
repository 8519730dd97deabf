import CoreGraphics
import CoreML
import Foundation

public struct UnitRecord: Codable {
    public var unit: String
    public var load_ms: Double
    public var first_ms: Double
    public var samples_ms: [Double]
    public var thermal_before: String
    public var thermal_after: String
    public var failed: String?
}

public struct Record: Codable {
    public var schema = "edgegen.coreml.benchmark/1"
    public var model: String
    public var device: String
    public var os: String
    public var low_power_mode: Bool
    public var compile_ms: Double
    public var iterations: Int
    public var units: [UnitRecord]
}

public enum Benchmark {
    static let units: [(String, MLComputeUnits)] = [
        ("CPU_ONLY", .cpuOnly), ("CPU_AND_GPU", .cpuAndGPU), ("CPU_AND_NE", .cpuAndNeuralEngine), ("ALL", .all),
    ]

    /// Cold load, first run and every steady run on each compute unit; pre- and post-processing are left out.
    public static func run(model url: URL, iterations: Int = 200, warmup: Int = 20) async throws -> Record {
        var start = DispatchTime.now()
        let compiled = url.pathExtension == "mlmodelc" ? url : try await MLModel.compileModel(at: url)
        let compileTime = milliseconds(since: start)
        let feeds = try MLDictionaryFeatureProvider(dictionary: [Facts.input: try sample()])
        var found: [UnitRecord] = []
        for (name, unit) in units {
            var record = UnitRecord(
                unit: name, load_ms: 0, first_ms: 0, samples_ms: [], thermal_before: thermal(), thermal_after: "",
                failed: nil)
            do {
                let settings = MLModelConfiguration()
                settings.computeUnits = unit
                start = DispatchTime.now()
                let model = try MLModel(contentsOf: compiled, configuration: settings)
                record.load_ms = milliseconds(since: start)
                start = DispatchTime.now()
                _ = try model.prediction(from: feeds)
                record.first_ms = milliseconds(since: start)
                for _ in 0..<warmup {
                    _ = try model.prediction(from: feeds)
                }
                for _ in 0..<iterations {
                    start = DispatchTime.now()
                    _ = try model.prediction(from: feeds)
                    record.samples_ms.append(milliseconds(since: start))
                }
            } catch {
                record.failed = error.localizedDescription
            }
            record.thermal_after = thermal()
            found.append(record)
        }
        let process = ProcessInfo.processInfo
        return Record(
            model: Facts.name, device: machine(), os: process.operatingSystemVersionString,
            low_power_mode: process.isLowPowerModeEnabled, compile_ms: compileTime, iterations: iterations,
            units: found)
    }

    public static func json(_ record: Record) throws -> Data {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
        return try encoder.encode(record)
    }

    /// A fixed input: a gray ramp, or noise of seed 0. Values do not matter to the time.
    static func sample() throws -> MLFeatureValue {
        if Facts.kind == .latent { return try Generator.feature(seed: 0) }
        let (height, width) = (Facts.crop.height, Facts.crop.width)
        let context = CGContext(
            data: nil, width: width, height: height, bitsPerComponent: 8, bytesPerRow: 4 * width,
            space: CGColorSpaceCreateDeviceRGB(), bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
        guard let canvas = context else { throw GeneratorError.cannotDraw }
        for x in 0..<width {
            canvas.setFillColor(gray: CGFloat(x) / CGFloat(max(1, width - 1)), alpha: 1)
            canvas.fill(CGRect(x: x, y: 0, width: 1, height: height))
        }
        guard let image = canvas.makeImage() else { throw GeneratorError.cannotDraw }
        return try Generator.feature(image: image)
    }

    static func milliseconds(since start: DispatchTime) -> Double {
        return Double(DispatchTime.now().uptimeNanoseconds - start.uptimeNanoseconds) / 1e6
    }

    static func thermal() -> String {
        switch ProcessInfo.processInfo.thermalState {
        case .nominal: return "nominal"
        case .fair: return "fair"
        case .serious: return "serious"
        case .critical: return "critical"
        @unknown default: return "unknown"
        }
    }

    /// Such as "iPhone16,1" or "Mac16,3".
    static func machine() -> String {
        #if os(macOS)
        let key = "hw.model"
        #else
        let key = "hw.machine"
        #endif
        var size = 0
        sysctlbyname(key, nil, &size, nil, 0)
        var text = [CChar](repeating: 0, count: max(1, size))
        sysctlbyname(key, &text, &size, nil, 0)
        return String(cString: text)
    }
}
