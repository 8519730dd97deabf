import Foundation
import Generator
import SwiftUI

@main
struct BenchmarkApp: App {
    var body: some Scene {
        WindowGroup { BenchmarkView() }
    }
}

struct BenchmarkView: View {
    @State private var text = "Measuring: leave the device alone, unplugged, not in low power mode."

    var body: some View {
        ScrollView {
            VStack(alignment: .leading) {
                ShareLink(item: text)
                Text(text).font(.system(.footnote, design: .monospaced))
            }
            .padding()
        }
        .task { await measure() }
    }

    private func measure() async {
        do {
            guard let url = Bundle.module.url(forResource: "model", withExtension: "mlpackage") else {
                text = "model.mlpackage is not in the app: copy it into BenchmarkApp.swiftpm"
                return
            }
            let record = try await Task.detached { try await Benchmark.run(model: url) }.value
            let json = try Benchmark.json(record)
            let folder = URL.documentsDirectory.appending(path: "record.json")
            try json.write(to: folder)
            text = String(decoding: json, as: UTF8.self)
        } catch {
            text = "Failed: \(error.localizedDescription)"
        }
    }
}
