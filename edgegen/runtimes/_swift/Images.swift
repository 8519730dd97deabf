import CoreGraphics
import CoreML
import CoreVideo
import Foundation

enum Images {
    /// The image, scaled and cropped as in training, in a bitmap of the input's size.
    private static func drawn(_ image: CGImage, into context: CGContext) {
        let (height, width) = (CGFloat(Facts.crop.height), CGFloat(Facts.crop.width))
        var size = CGSize(width: width, height: height)
        if Facts.resize > 0 {
            let shorter = CGFloat(min(image.width, image.height))
            let scale = CGFloat(Facts.resize) / shorter
            size = CGSize(width: CGFloat(image.width) * scale, height: CGFloat(image.height) * scale)
        }
        let corner = CGPoint(x: (width - size.width) / 2, y: (height - size.height) / 2)
        context.interpolationQuality = .high
        context.draw(image, in: CGRect(origin: corner, size: size))
    }

    private static var isGray: Bool {
        return Facts.shape.count == 4 && Facts.shape[1] == 1
    }

    static func pixelBuffer(from image: CGImage) throws -> CVPixelBuffer {
        let format = isGray ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
        var made: CVPixelBuffer?
        CVPixelBufferCreate(nil, Facts.crop.width, Facts.crop.height, format, nil, &made)
        guard let buffer = made else { throw GeneratorError.cannotDraw }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        let info = isGray
            ? CGImageAlphaInfo.none.rawValue
            : CGImageAlphaInfo.noneSkipFirst.rawValue | CGBitmapInfo.byteOrder32Little.rawValue
        let context = CGContext(
            data: CVPixelBufferGetBaseAddress(buffer), width: Facts.crop.width, height: Facts.crop.height,
            bitsPerComponent: 8, bytesPerRow: CVPixelBufferGetBytesPerRow(buffer),
            space: isGray ? CGColorSpaceCreateDeviceGray() : CGColorSpaceCreateDeviceRGB(), bitmapInfo: info)
        guard let canvas = context else { throw GeneratorError.cannotDraw }
        drawn(image, into: canvas)
        return buffer
    }

    /// (value_range, then (x - mean) / std) of every pixel, channels first.
    static func normalised(from image: CGImage) throws -> MLMultiArray {
        let buffer = try pixelBuffer(from: image)
        CVPixelBufferLockBaseAddress(buffer, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(buffer, .readOnly) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else { throw GeneratorError.cannotDraw }
        let bytes = base.assumingMemoryBound(to: UInt8.self)
        let (row, height, width) = (CVPixelBufferGetBytesPerRow(buffer), Facts.crop.height, Facts.crop.width)
        let array = try MLMultiArray(shape: Facts.shape.map { NSNumber(value: $0) }, dataType: .float32)
        let (low, high) = (Facts.inputRange.low, Facts.inputRange.high)
        for channel in 0..<Facts.shape[1] {
            for y in 0..<height {
                for x in 0..<width {
                    let offset = isGray ? y * row + x : y * row + 4 * x + (2 - channel)  // BGRA
                    let value = low + (high - low) * Float(bytes[offset]) / 255
                    let index = (channel * height + y) * width + x
                    array[index] = NSNumber(value: (value - Facts.mean[channel]) / Facts.std[channel])
                }
            }
        }
        return array
    }

    /// The output (1, C, H, W) in its value range as an 8-bit image.
    static func image(from values: MLMultiArray) throws -> CGImage {
        let sizes = values.shape.map { $0.intValue }
        guard sizes.count == 4, sizes[1] == 1 || sizes[1] == 3 else { throw GeneratorError.cannotDraw }
        let (channels, height, width) = (sizes[1], sizes[2], sizes[3])
        let steps = values.strides.map { $0.intValue }
        let (low, high) = (Facts.outputRange.low, Facts.outputRange.high)
        var pixels = [UInt8](repeating: 255, count: height * width * 4)
        for y in 0..<height {
            for x in 0..<width {
                for channel in 0..<3 {
                    let index = min(channel, channels - 1) * steps[1] + y * steps[2] + x * steps[3]
                    let level = 255 * (values[index].floatValue - low) / (high - low)
                    pixels[(y * width + x) * 4 + channel] = UInt8(max(0, min(255, level.rounded())))
                }
            }
        }
        guard
            let provider = CGDataProvider(data: Data(pixels) as CFData),
            let made = CGImage(
                width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32, bytesPerRow: 4 * width,
                space: CGColorSpaceCreateDeviceRGB(),
                bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue), provider: provider,
                decode: nil, shouldInterpolate: false, intent: .defaultIntent)
        else { throw GeneratorError.cannotDraw }
        return made
    }
}
