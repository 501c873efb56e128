package smolport

import java.io.File
import kotlin.system.exitProcess

private const val USAGE = """usage: check [--key FILE] [--min-version N] [--allow-pending] BUNDLE

Checks a bundle's signature (by the public key FILE), manifest, sizes and digests, then makes pixels, tile grids and token
ids of every golden case and compares them with the case's.

exit code 0: all equal; 1: a difference, which is named; 2: the bundle or an argument cannot be used"""

/** What `check` does: prints a line for each thing that is right; returns the first difference, null where there is none. */
fun check(folder: File, pin: Pin?, allowPending: Boolean, say: (String) -> Unit): String? {
    val bundle = Bundle.open(folder, pin, allowPending)
    if (pin != null) say("signature: by the given key, version ${bundle.manifest.version}")
    say("files: ${bundle.manifest.files.count { bundle.hasEvidence || !it.evidence }} of the sizes and digests listed")
    bundle.manifest.notes.forEach { say("note: ${shown(it, 1000)}") }
    if (!bundle.hasEvidence) throw BadInput("$folder: its evidence was left out, golden cases among it")
    Limits.read(bundle)
    val inputs = Inputs(bundle)
    for (case in Case.read(bundle)) {
        inputs.difference(case)?.let { return "case ${shown(case.name)}: $it" }
        case.features() // there, and of the right shape
        case.logits()
        val tiles = case.grids.sumOf { (rows, cols) -> rows * cols + 1 }
        say("case ${shown(case.name)}: ${case.grids.size} images, $tiles tiles and ${case.ids.size} ids equal")
    }
    return null
}

fun main(arguments: Array<String>) {
    val left = arguments.toMutableList()
    fun flag(name: String) = left.remove(name)
    fun option(name: String): String? {
        val at = left.indexOf(name)
        if (at < 0) return null
        left.removeAt(at)
        return left.getOrNull(at)?.also { left.removeAt(at) } ?: throw BadInput("$name: wants a value")
    }
    val code = try {
        if (flag("--help")) {
            println(USAGE)
            exitProcess(0)
        }
        val key = option("--key")
        val least = option("--min-version")?.let {
            it.toLongOrNull() ?: throw BadInput("--min-version is ${shown(it)}, want a number")
        }
        if (least != null && key == null) throw BadInput("--min-version: wants --key too: an unsigned version says nothing")
        val allowPending = flag("--allow-pending")
        if (left.size != 1 || left[0].startsWith("--")) throw BadInput("want one BUNDLE\n$USAGE")
        val difference = check(File(left[0]), key?.let { Pin(PublicKey.read(File(it)), least ?: 1) }, allowPending, ::println)
        if (difference != null) System.err.println("error: $difference")
        if (difference == null) 0 else 1
    } catch (fault: BadInput) {
        System.err.println("error: ${fault.message}")
        2
    }
    exitProcess(code)
}
