// UNVERIFIED: a sample that has never been compiled or run; no Android SDK could be had where it was written. What it
// calls in package smolport was compiled and run on a JVM. Needs com.microsoft.onnxruntime:onnxruntime-android 1.23 or
// later, androidx.exifinterface:exifinterface, minSdk 26 (java.nio.file). See README.md.
package smolport.sample

import android.app.Activity
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.os.Bundle as State
import android.widget.ScrollView
import android.widget.TextView
import androidx.exifinterface.media.ExifInterface
import java.io.File
import kotlin.concurrent.thread
import smolport.BadInput
import smolport.Bundle
import smolport.Case
import smolport.Image
import smolport.ImagePart
import smolport.ImageSettings
import smolport.Inputs
import smolport.Limits
import smolport.Message
import smolport.Pin
import smolport.PromptEncoder
import smolport.PublicKey
import smolport.Rgb
import smolport.Sampling
import smolport.Text
import smolport.TextStream
import smolport.Tokenizer
import smolport.Verdict

/** Checks the bundle in filesDir/model, replays its golden cases once, and answers a question about filesDir/picture. */
class AskActivity : Activity() {
    private lateinit var view: TextView

    override fun onCreate(state: State?) {
        super.onCreate(state)
        view = TextView(this)
        setContentView(ScrollView(this).apply { addView(view) })
        thread {
            try {
                answer("What is in this picture?")
            } catch (fault: BadInput) {
                say("\nerror: ${fault.message}")
            } catch (fault: ai.onnxruntime.OrtException) {
                say("\nerror: the engine failed: ${fault.message}")
            }
        }
    }

    private fun say(text: String) = runOnUiThread { view.append(text) }

    private fun answer(question: String) {
        val bundle = Bundle.open(File(filesDir, "model"), Pin(PublicKey.parse(PUBLIC_KEY, "the pinned key")))
        val settings = ImageSettings.parse(bundle.json("preprocessor_config.json"))
        val encoder = PromptEncoder.of(bundle)
        Decoder(bundle).use { decoder ->
            proveOnce(bundle, decoder, settings)
            val tiles = Image.cut(load(File(filesDir, "picture")), settings)
            val features = decoder.encodeImage(Image.normalize(tiles.bytes, settings), tiles.count)
            val ids = encoder.encode(listOf(Message("user", listOf(ImagePart(tiles.rows, tiles.cols), Text(question)))))
            val stream = TextStream(Tokenizer.parse(bundle.json("tokenizer.json")))
            val sampling = Sampling()
            val seen = ids.toMutableList()
            var logits = decoder.extend(ids, features)
            val text = bundle.manifest.text
            for (left in 255 downTo 0) {
                val token = sampling.choose(logits, seen, text.imageTokenId, Math::random)
                if (token in text.eosIds) break
                say(stream.push(token))
                if (left == 0 || decoder.length >= text.context) break
                seen += token
                logits = decoder.extend(listOf(token), null)
            }
        }
    }

    /** The golden cases, once for each payload, app and system: another processor has other kernels. */
    private fun proveOnce(bundle: Bundle, decoder: Decoder, settings: ImageSettings) {
        val app = packageManager.getPackageInfo(packageName, 0).lastUpdateTime
        val mark = "${bundle.manifest.payloadDigest} $app ${android.os.Build.FINGERPRINT}"
        val done = getSharedPreferences("smolport", MODE_PRIVATE)
        if (done.getString("proved", "") == mark) return
        val limits = Limits.read(bundle)
        val inputs = Inputs(bundle)
        for (case in Case.read(bundle)) {
            inputs.difference(case)?.let { throw BadInput("golden case ${case.name}: $it") }
            val tiles = case.tiles()
            val count = case.grids.sumOf { (rows, cols) -> rows * cols + 1 }
            val features = if (count == 0) FloatArray(0) else decoder.encodeImage(Image.normalize(tiles, settings), count)
            decoder.clear()
            val rows = ArrayList<FloatArray>()
            rows += decoder.extend(case.ids, features)
            for (token in case.tokens.dropLast(1)) rows += decoder.extend(listOf(token), null)
            val logits = FloatArray(rows.sumOf { it.size })
            rows.forEachIndexed { i, row -> row.copyInto(logits, i * row.size) }
            val faults = Verdict.of(case, features, logits, limits).faults
            if (faults.isNotEmpty()) throw BadInput("golden case ${case.name}: ${faults[0]}")
        }
        decoder.clear()
        done.edit().putString("proved", mark).apply()
    }

    /** The file's pixels as FORMAT.md wants them: unscaled, not premultiplied, upright, on white. */
    private fun load(file: File): Rgb {
        val options = BitmapFactory.Options().apply {
            inScaled = false
            inPremultiplied = false
            inPreferredConfig = Bitmap.Config.ARGB_8888
        }
        val bitmap = BitmapFactory.decodeFile(file.path, options) ?: throw BadInput("$file: is no picture that this system reads")
        val argb = IntArray(bitmap.width * bitmap.height)
        bitmap.getPixels(argb, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
        val rgba = ByteArray(argb.size * 4)
        argb.forEachIndexed { i, pixel ->
            rgba[i * 4] = (pixel shr 16).toByte()
            rgba[i * 4 + 1] = (pixel shr 8).toByte()
            rgba[i * 4 + 2] = pixel.toByte()
            rgba[i * 4 + 3] = (pixel ushr 24).toByte()
        }
        val turn = ExifInterface(file).getAttributeInt(ExifInterface.TAG_ORIENTATION, ExifInterface.ORIENTATION_NORMAL)
        return Rgb.onWhite(bitmap.width, bitmap.height, rgba).upright(turn)
    }

    private companion object {
        const val PUBLIC_KEY = "-----BEGIN PUBLIC KEY----- the file.pub of runtimes.keys -----END PUBLIC KEY-----"
    }
}
