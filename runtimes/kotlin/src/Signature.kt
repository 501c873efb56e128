package smolport

import java.io.File
import java.io.IOException
import java.security.GeneralSecurityException
import java.security.KeyFactory
import java.security.Signature
import java.security.spec.X509EncodedKeySpec
import java.util.Base64

/** Whether [signature] is by the Ed25519 public key [key], 32 bytes, over [message] (RFC 8032). */
fun interface Ed25519 {
    fun verifies(key: ByteArray, message: ByteArray, signature: ByteArray): Boolean
}

/**
 * Ed25519 by java.security: Java 15 and later, Android 13 (API 33) and later.
 *
 * Below that implement [Ed25519] with Tink (`Ed25519Verify(key).verify(signature, message)`, which throws) or Bouncy
 * Castle (`Ed25519Signer`): one method each.
 */
object PlatformEd25519 : Ed25519 {
    override fun verifies(key: ByteArray, message: ByteArray, signature: ByteArray): Boolean = try {
        val public = KeyFactory.getInstance("Ed25519").generatePublic(X509EncodedKeySpec(PublicKey.DER + key))
        Signature.getInstance("Ed25519").run {
            initVerify(public)
            update(message)
            verify(signature)
        }
    } catch (fault: java.security.SignatureException) {
        false // a signature that is no point of the curve is one that does not fit
    } catch (fault: GeneralSecurityException) {
        throw BadInput("this system cannot check Ed25519 with that key: ${fault.message}", fault)
    }
}

/** A pinned public key. */
object PublicKey {
    /** What stands before the key's 32 bytes in DER (RFC 8410). */
    val DER: ByteArray = "302a300506032b6570032100".chunked(2).map { it.toInt(16).toByte() }.toByteArray()
    private const val MOST_BYTES = 4096

    /** The 32 bytes of a public key in PEM, as `runtimes.keys` and openssl write it. Throws BadInput. */
    fun read(file: File): ByteArray {
        try {
            if (file.length() > MOST_BYTES) throw BadInput("$file: is no Ed25519 public key in PEM")
            return parse(file.readText(Charsets.ISO_8859_1), "$file")
        } catch (fault: IOException) {
            throw BadInput("$file: cannot be read: ${fault.message}", fault)
        }
    }

    /** The same of a text, such as a string constant of an app. */
    fun parse(pem: String, where: String): ByteArray {
        val words = pem.trim().split(Regex("\\s+")).joinToString(" ")
        val base64 = Regex("-----BEGIN PUBLIC KEY----- ([A-Za-z0-9+/=]+) -----END PUBLIC KEY-----").matchEntire(words)
        val der = try {
            base64?.let { Base64.getDecoder().decode(it.groupValues[1]) }
        } catch (fault: IllegalArgumentException) {
            null
        }
        if (der == null || der.size != DER.size + 32 || !der.copyOf(DER.size).contentEquals(DER))
            throw BadInput("$where: is no Ed25519 public key in PEM")
        return der.copyOfRange(DER.size, der.size)
    }
}

/** What an app asks of a bundle besides its digests: a signature by [key], 32 bytes, and at least [leastVersion]. */
class Pin(val key: ByteArray, val leastVersion: Long = 1, val ed25519: Ed25519 = PlatformEd25519) {
    /** Throws BadInput unless [signature], the content of manifest.json.sig or null, fits [manifest]'s bytes. */
    fun check(manifest: ByteArray, signature: ByteArray?, where: String) {
        val name = Manifest.SIGNATURE
        if (signature == null) throw BadInput("$where: is not signed (it has no $name), and a signature is asked for")
        if (signature.size != 64) throw BadInput("$where: $name has ${signature.size} bytes, want 64")
        if (!ed25519.verifies(key, manifest, signature))
            throw BadInput("$where: $name does not fit ${Manifest.NAME} and the key: another key signed it, or it was changed since")
    }
}
