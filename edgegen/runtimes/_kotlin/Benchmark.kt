package edgegen.sample

import android.content.Context
import android.os.Build
import android.os.PowerManager

/** Cold load, first run and every steady run, for the CPU and the GPU. */
object Benchmark {
    fun run(context: Context, iterations: Int = 200, warmup: Int = 20): Record {
        val found = listOf("XNNPACK", "GPU").map { measure(context, it, iterations, warmup) }
        val device = "${Build.MANUFACTURER} ${Build.MODEL} (${Build.HARDWARE})"
        return Record(device, "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT})", thermal(context), found)
    }

    private fun measure(context: Context, delegate: String, iterations: Int, warmup: Int): DelegateRecord {
        try {
            var start = System.nanoTime()
            Generator(context, delegate).use { generator ->
                val load = since(start)
                start = System.nanoTime()
                generator.invoke()
                val first = since(start)
                repeat(warmup) { generator.invoke() }
                val samples = List(iterations) {
                    start = System.nanoTime()
                    generator.invoke()
                    since(start)
                }
                return DelegateRecord(delegate, load, first, samples)
            }
        } catch (error: RuntimeException) {
            return DelegateRecord(delegate, 0.0, 0.0, emptyList(), error.message ?: error.javaClass.name)
        } catch (error: LinkageError) {
            return DelegateRecord(delegate, 0.0, 0.0, emptyList(), error.message ?: error.javaClass.name)
        }
    }

    private fun since(start: Long): Double = (System.nanoTime() - start) / 1e6

    private fun thermal(context: Context): String {
        val power = context.getSystemService(Context.POWER_SERVICE) as PowerManager
        return if (Build.VERSION.SDK_INT >= 29) "status ${power.currentThermalStatus}" else "unknown"
    }
}
