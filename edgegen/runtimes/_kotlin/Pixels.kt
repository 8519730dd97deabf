package edgegen.sample

import kotlin.math.abs
import kotlin.math.ceil
import kotlin.math.cos
import kotlin.math.ln
import kotlin.math.max
import kotlin.math.min
import kotlin.math.round
import kotlin.math.sqrt

/** An image of packed ARGB pixels, row by row, as android.graphics.Bitmap gives them. */
class Picture(val width: Int, val height: Int, val pixels: IntArray)

/** The network's own pre- and post-processing. Needs nothing of Android. */
object Pixels {
    /** Resized, cropped, mapped to the network's range, in the layout of the file. */
    fun input(picture: Picture): FloatArray {
        val seen = view(picture)
        val size = Facts.WIDTH * Facts.HEIGHT
        val values = FloatArray(size * Facts.CHANNELS)
        for (at in 0 until size) {
            val pixel = seen.pixels[at]
            val red = (pixel shr 16) and 255
            val green = (pixel shr 8) and 255
            val blue = pixel and 255
            for (channel in 0 until Facts.CHANNELS) {
                val level = when {
                    Facts.CHANNELS == 1 -> (19595 * red + 38470 * green + 7471 * blue + 32768) shr 16
                    channel == 0 -> red
                    channel == 1 -> green
                    else -> blue
                }
                val x = level * ((Facts.HIGH_IN - Facts.LOW_IN) / 255f) + Facts.LOW_IN
                val index = if (Facts.INPUT_CHANNELS_LAST) at * Facts.CHANNELS + channel else channel * size + at
                values[index] = (x - Facts.MEAN[channel]) / Facts.STD[channel]
            }
        }
        return values
    }

    /** The network's output as a picture. */
    fun picture(values: FloatArray): Picture {
        val size = Facts.OUT_WIDTH * Facts.OUT_HEIGHT
        val pixels = IntArray(size)
        for (at in 0 until size) {
            var pixel = 255
            for (channel in 0 until 3) {
                val own = min(channel, Facts.OUT_CHANNELS - 1)
                val index = if (Facts.OUTPUT_CHANNELS_LAST) at * Facts.OUT_CHANNELS + own else own * size + at
                val share = (values[index] - Facts.LOW_OUT) / (Facts.HIGH_OUT - Facts.LOW_OUT)
                pixel = (pixel shl 8) or round(share.coerceIn(0f, 1f) * 255f).toInt()
            }
            pixels[at] = pixel
        }
        return Picture(Facts.OUT_WIDTH, Facts.OUT_HEIGHT, pixels)
    }

    /** (index, score) of the likeliest classes, best first. */
    fun best(values: FloatArray, count: Int = 5): List<Pair<Int, Float>> =
        values.withIndex().sortedByDescending { it.value }.take(count).map { Pair(it.index, it.value) }

    /** Standard normal numbers; the same seed gives the same. */
    fun latent(seed: Long): FloatArray {
        var state = seed + -0x61C8864680B583EBL
        fun uniform(): Double {
            state = state xor (state shl 13)
            state = state xor (state ushr 7)
            state = state xor (state shl 17)
            return ((state ushr 11) + 0.5) / 9007199254740992.0
        }
        return FloatArray(Facts.INPUT_SHAPE.fold(1) { product, size -> product * size }) {
            (sqrt(-2.0 * ln(uniform())) * cos(2.0 * Math.PI * uniform())).toFloat()
        }
    }

    /** The part of the picture that the network looks at, in its size. */
    fun view(picture: Picture): Picture {
        var seen = picture
        if (Facts.RESIZE > 0) {
            val factor = Facts.RESIZE / min(seen.width, seen.height).toDouble()
            seen = resized(seen, (seen.width * factor + 1e-6).toInt(), (seen.height * factor + 1e-6).toInt())
        }
        if (Facts.CROP_WIDTH > 0) {
            seen = cropped(seen, Facts.CROP_WIDTH, Facts.CROP_HEIGHT)
        }
        if (seen.width != Facts.WIDTH || seen.height != Facts.HEIGHT) {
            val factor = max(Facts.HEIGHT / seen.height.toDouble(), Facts.WIDTH / seen.width.toDouble())
            seen = resized(seen, round(seen.width * factor).toInt(), round(seen.height * factor).toInt())
            seen = cropped(seen, Facts.WIDTH, Facts.HEIGHT)
        }
        return seen
    }

    private fun cropped(picture: Picture, width: Int, height: Int): Picture {
        val left = max(0, round((picture.width - width) / 2.0).toInt())
        val top = max(0, round((picture.height - height) / 2.0).toInt())
        val pixels = IntArray(width * height) { picture.pixels[(top + it / width) * picture.width + left + it % width] }
        return Picture(width, height, pixels)
    }

    /** Bicubic, antialiased when it shrinks: what the network was trained and measured with. */
    fun resized(picture: Picture, width: Int, height: Int): Picture {
        if (picture.width == width && picture.height == height) return picture
        val wide = Picture(width, picture.height, IntArray(width * picture.height))
        for ((x, taps) in weights(picture.width, width).withIndex()) {
            for (y in 0 until picture.height) {
                wide.pixels[y * width + x] = mixed(taps) { picture.pixels[y * picture.width + it] }
            }
        }
        val done = Picture(width, height, IntArray(width * height))
        for ((y, taps) in weights(picture.height, height).withIndex()) {
            for (x in 0 until width) {
                done.pixels[y * width + x] = mixed(taps) { wide.pixels[it * width + x] }
            }
        }
        return done
    }

    private class Taps(val first: Int, val weights: DoubleArray)

    private fun weights(from: Int, to: Int): List<Taps> {
        val scale = from / to.toDouble()
        val stretch = max(1.0, scale)
        val support = 2.0 * stretch
        return List(to) { index ->
            val centre = (index + 0.5) * scale
            val first = max(0, (centre - support + 0.5).toInt())
            val last = min(from, (centre + support + 0.5).toInt())
            val found = DoubleArray(last - first) { cubic((it + first - centre + 0.5) / stretch) }
            val total = found.sum()
            Taps(first, DoubleArray(found.size) { found[it] / total })
        }
    }

    private fun cubic(distance: Double): Double {
        val x = abs(distance)
        return when {
            x < 1.0 -> (1.5 * x - 2.5) * x * x + 1.0
            x < 2.0 -> ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
            else -> 0.0
        }
    }

    private inline fun mixed(taps: Taps, pixel: (Int) -> Int): Int {
        var red = 0.0
        var green = 0.0
        var blue = 0.0
        for ((offset, weight) in taps.weights.withIndex()) {
            val value = pixel(taps.first + offset)
            red += weight * ((value shr 16) and 255)
            green += weight * ((value shr 8) and 255)
            blue += weight * (value and 255)
        }
        return (255 shl 24) or (level(red) shl 16) or (level(green) shl 8) or level(blue)
    }

    private fun level(value: Double): Int = ceil(value - 0.5).toInt().coerceIn(0, 255)
}
