package edgegen.sample

import android.app.Activity
import android.os.Bundle
import android.widget.TextView
import java.io.File
import kotlin.concurrent.thread

/** Measures at start, shows the record, and leaves it in benchmark.json of the app's own folder. */
class MainActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val text = TextView(this)
        text.text = "measuring ${Facts.NAME} ..."
        setContentView(text)
        thread {
            val record = Benchmark.run(this).json()
            val file = File(getExternalFilesDir(null) ?: filesDir, "benchmark.json")
            file.writeText(record)
            runOnUiThread { text.text = "$file\n\n$record" }
        }
    }
}
