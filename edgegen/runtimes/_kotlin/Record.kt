package edgegen.sample

/** What one delegate did; `failed` says why it did nothing. */
class DelegateRecord(
    val delegate: String,
    val loadMs: Double,
    val firstMs: Double,
    val samplesMs: List<Double>,
    val failed: String? = null,
)

/** A measurement as JSON: times of the network alone, in milliseconds, without pre- and post-processing. */
class Record(val device: String, val os: String, val thermal: String, val delegates: List<DelegateRecord>) {
    fun json(): String {
        val parts = delegates.joinToString(",\n  ") { one ->
            val samples = one.samplesMs.joinToString(", ")
            """{"delegate": ${quoted(one.delegate)}, "load_ms": ${one.loadMs}, "first_ms": ${one.firstMs}, """ +
                """"samples_ms": [$samples], "failed": ${one.failed?.let { quoted(it) } ?: "null"}}"""
        }
        return """{"schema": "edgegen.litert.benchmark/1", "model": ${quoted(Facts.NAME)}, """ +
            """"device": ${quoted(device)}, "os": ${quoted(os)}, "thermal": ${quoted(thermal)}, """ +
            """"threads": ${Facts.THREADS}, "delegates": [""" + "\n  $parts\n]}\n"
    }

    private fun quoted(text: String): String {
        val inner = text.map { letter ->
            when {
                letter == '"' || letter == '\\' -> "\\$letter"
                letter < ' ' -> "\\u%04x".format(letter.code)
                else -> letter.toString()
            }
        }
        return inner.joinToString("", "\"", "\"")
    }
}
