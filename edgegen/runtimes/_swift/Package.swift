// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "Generator",
    platforms: [.iOS("@IOS@.0"), .macOS("@MACOS@.0")],
    products: [
        .library(name: "Generator", targets: ["Generator"]),
        .executable(name: "edgegen-benchmark", targets: ["edgegen-benchmark"]),
    ],
    targets: [
        .target(name: "Generator"),
        .executableTarget(name: "edgegen-benchmark", dependencies: ["Generator"]),
    ]
)
