// What edgegen wrote down about this model.

public enum InputKind {
    case image, pixels, latent
}

public enum Facts {
    public static let name = @NAME@
    public static let input = @INPUT@
    public static let output = @OUTPUT@
    /// image: the package takes 8-bit pixels and normalises them itself; pixels: a tensor of normalised pixels;
    /// latent: a tensor of normally distributed numbers.
    public static let kind: InputKind = @KIND@
    public static let shape: [Int] = @SHAPE@
    /// Length of the shorter side before the centre crop; 0: the image is scaled to the input's size.
    public static let resize: Int = @RESIZE@
    public static let crop: (height: Int, width: Int) = @CROP@
    /// Pixel 0 and 255 map to these, before (x - mean) / std; only used where kind is pixels.
    public static let inputRange: (low: Float, high: Float) = (@LOW_IN@, @HIGH_IN@)
    public static let mean: [Float] = @MEAN@
    public static let std: [Float] = @STD@
    public static let givesClasses = @CLASSES@
    public static let outputRange: (low: Float, high: Float) = (@LOW_OUT@, @HIGH_OUT@)
}
