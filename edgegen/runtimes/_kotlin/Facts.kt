package edgegen.sample

/** What the code needs to know about @TITLE@. */
object Facts {
    const val NAME = @NAME@
    const val MODEL = @MODEL@

    /** "image": takes pixels; "latent": starts from noise; "array": takes what the caller prepares. */
    const val KIND = @KIND@
    val INPUT_SHAPE = intArrayOf(@INPUT_SHAPE@)
    val OUTPUT_SHAPE = intArrayOf(@OUTPUT_SHAPE@)

    /** Whether images lie channels-last (NHWC) in the file; else NCHW. */
    const val INPUT_CHANNELS_LAST = @INPUT_LAST@
    const val OUTPUT_CHANNELS_LAST = @OUTPUT_LAST@
    const val WIDTH = @WIDTH@
    const val HEIGHT = @HEIGHT@
    const val CHANNELS = @CHANNELS@
    const val OUT_WIDTH = @OUT_WIDTH@
    const val OUT_HEIGHT = @OUT_HEIGHT@
    const val OUT_CHANNELS = @OUT_CHANNELS@

    /** Length of the shorter side after resizing, and the centre crop behind it; 0: none. */
    const val RESIZE = @RESIZE@
    const val CROP_HEIGHT = @CROP_HEIGHT@
    const val CROP_WIDTH = @CROP_WIDTH@

    /** What pixel 0 and 255 are, before (x - mean) / std. */
    const val LOW_IN = @LOW_IN@
    const val HIGH_IN = @HIGH_IN@
    val MEAN = floatArrayOf(@MEAN@)
    val STD = floatArrayOf(@STD@)
    const val GIVES_CLASSES = @CLASSES@
    const val LOW_OUT = @LOW_OUT@
    const val HIGH_OUT = @HIGH_OUT@
    const val THREADS = @THREADS@
}
