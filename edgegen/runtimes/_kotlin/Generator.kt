package edgegen.sample

import android.content.Context
import android.graphics.Bitmap
import java.io.Closeable
import java.io.FileInputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import org.tensorflow.lite.Delegate
import org.tensorflow.lite.Interpreter
import org.tensorflow.lite.gpu.GpuDelegate

/** @TITLE@, with its own pre- and post-processing. `delegate`: "XNNPACK" (CPU) or "GPU". */
class Generator(context: Context, delegate: String = "XNNPACK") : Closeable {
    private val gpu: Delegate? = if (delegate == "GPU") GpuDelegate() else null
    private val interpreter: Interpreter
    private val given = buffer(Facts.INPUT_SHAPE)
    private val made = buffer(Facts.OUTPUT_SHAPE)

    init {
        val options = Interpreter.Options().setNumThreads(Facts.THREADS).setUseXNNPACK(true)
        gpu?.let { options.addDelegate(it) }
        interpreter = Interpreter(model(context), options)
    }

    /** The picture that the network makes of a bitmap. */
    fun run(bitmap: Bitmap): Bitmap {
        check(Facts.KIND == "image" && !Facts.GIVES_CLASSES) { "${Facts.NAME} does not make pictures of pictures" }
        return bitmap(Pixels.picture(run(Pixels.input(picture(bitmap)))))
    }

    /** The likeliest classes of a bitmap: (index, score), best first. */
    fun classify(bitmap: Bitmap): List<Pair<Int, Float>> {
        check(Facts.KIND == "image" && Facts.GIVES_CLASSES) { "${Facts.NAME} does not tell classes" }
        return Pixels.best(run(Pixels.input(picture(bitmap))))
    }

    /** The picture that the network makes of noise; another seed, another picture. */
    fun run(seed: Long): Bitmap {
        check(Facts.KIND == "latent") { "${Facts.NAME} does not start from noise" }
        return bitmap(Pixels.picture(run(Pixels.latent(seed))))
    }

    /** The network alone: values in the layout of the file, in and out. */
    fun run(values: FloatArray): FloatArray {
        given.rewind()
        given.asFloatBuffer().put(values)
        invoke()
        val found = FloatArray(made.capacity() / Float.SIZE_BYTES)
        made.rewind()
        made.asFloatBuffer().get(found)
        return found
    }

    /** The network on whatever its input holds: what the benchmark times. */
    fun invoke() {
        given.rewind()
        made.rewind()
        interpreter.run(given, made)
    }

    override fun close() {
        interpreter.close()
        gpu?.close()
    }

    private fun buffer(shape: IntArray): ByteBuffer {
        val size = shape.fold(Float.SIZE_BYTES) { product, length -> product * length }
        return ByteBuffer.allocateDirect(size).order(ByteOrder.nativeOrder())
    }

    private fun model(context: Context): ByteBuffer =
        context.assets.openFd(Facts.MODEL).use { file ->
            FileInputStream(file.fileDescriptor).channel.use { channel ->
                channel.map(FileChannel.MapMode.READ_ONLY, file.startOffset, file.declaredLength)
            }
        }

    private fun picture(bitmap: Bitmap): Picture {
        val pixels = IntArray(bitmap.width * bitmap.height)
        bitmap.getPixels(pixels, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
        return Picture(bitmap.width, bitmap.height, pixels)
    }

    private fun bitmap(picture: Picture): Bitmap =
        Bitmap.createBitmap(picture.pixels, picture.width, picture.height, Bitmap.Config.ARGB_8888)
}
