// swift-tools-version:5.9
import AppleProductTypes
import PackageDescription

let package = Package(
    name: "BenchmarkApp",
    platforms: [.iOS("@IOS@.0")],
    products: [
        .iOSApplication(
            name: "BenchmarkApp",
            targets: ["BenchmarkApp"],
            displayVersion: "1.0",
            bundleVersion: "1",
            supportedDeviceFamilies: [.phone, .pad],
            supportedInterfaceOrientations: [.portrait, .landscapeLeft, .landscapeRight]
        )
    ],
    dependencies: [.package(path: "..")],
    targets: [
        .executableTarget(
            name: "BenchmarkApp",
            dependencies: [.product(name: "Generator", package: "Generator")],
            path: ".",
            resources: [.copy("model.mlpackage")]
        )
    ]
)
