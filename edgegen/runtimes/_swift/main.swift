import Foundation
import Generator

let arguments = CommandLine.arguments
guard arguments.count == 3 else {
    print("usage: edgegen-benchmark model.mlpackage record.json")
    exit(2)
}
let record = try await Benchmark.run(model: URL(fileURLWithPath: arguments[1]))
try Benchmark.json(record).write(to: URL(fileURLWithPath: arguments[2]))
for unit in record.units {
    let sorted = unit.samples_ms.sorted()
    let middle = sorted.isEmpty ? "failed: \(unit.failed ?? "")" : "\(sorted[sorted.count / 2]) ms"
    print("\(unit.unit): \(middle), first run \(unit.first_ms) ms, load \(unit.load_ms) ms")
}
