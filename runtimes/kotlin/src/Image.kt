package smolport

/** An RGB image: [bytes] are rows from the top, each of [width] pixels, each of three bytes. */
class Rgb(val width: Int, val height: Int, val bytes: ByteArray) {
    init {
        if (width < 1 || height < 1 || width.toLong() * height > Image.MAX_PIXELS)
            throw BadInput("an image of $width x $height pixels, want 1 to ${Image.MAX_PIXELS}")
        if (bytes.size.toLong() != 3L * width * height)
            throw BadInput("an image of $width x $height has ${bytes.size} bytes, want ${3L * width * height}")
    }

    /** The image upright, by the number of its EXIF orientation (1 to 8; any other leaves it as it is). */
    fun upright(orientation: Int): Rgb {
        if (orientation !in 2..8) return this
        val turned = orientation >= 5
        val fromRight = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8
        val fromBottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7
        val out = ByteArray(bytes.size)
        val (w, h) = if (turned) height to width else width to height
        for (y in 0 until h) for (x in 0 until w) {
            val left = if (turned) y else x
            val top = if (turned) x else y
            val from = (if (fromBottom) height - 1 - top else top) * width + if (fromRight) width - 1 - left else left
            for (channel in 0 until 3) out[(y * w + x) * 3 + channel] = bytes[from * 3 + channel]
        }
        return Rgb(w, h, out)
    }

    companion object {
        /** RGBA, not premultiplied, four bytes a pixel, on white: Pillow's alpha_composite in its integer arithmetic. */
        fun onWhite(width: Int, height: Int, rgba: ByteArray): Rgb {
            if (rgba.size.toLong() != 4L * width * height)
                throw BadInput("an image of $width x $height has ${rgba.size} bytes, want ${4L * width * height}")
            val out = ByteArray(rgba.size / 4 * 3)
            for (pixel in 0 until rgba.size / 4) {
                val alpha = rgba[pixel * 4 + 3].toInt() and 255
                for (channel in 0 until 3) {
                    val value = rgba[pixel * 4 + channel].toInt() and 255
                    val mixed = 128 * (value * alpha + 255 * (255 - alpha) + 128)
                    out[pixel * 3 + channel] = if (alpha == 0) -1 else (((mixed shr 8) + mixed shr 8) shr 7).toByte()
                }
            }
            return Rgb(width, height, out)
        }
    }
}

/** An image, cut: [bytes] are u8 [tiles, S, S, 3]; [rows] and [cols] are 0 where it was not split. */
class Tiles(val bytes: ByteArray, val rows: Int, val cols: Int) {
    val count get() = rows * cols + 1
}

/** How images become tiles: the fields of preprocessor_config.json that matter; sizes in pixels. */
class ImageSettings(
    val tileSize: Int,
    val longestEdge: Int,
    val split: Boolean,
    val resize: Boolean,
    val factor: Double,
    val mean: List<Double>,
    val std: List<Double>,
) {
    /** The same with another [longestEdge]: 1, 2, 3 or 4 tile sizes give at most 1, 5, 10 or 17 tiles. */
    fun withLongestEdge(longestEdge: Int, resize: Boolean = true): ImageSettings {
        if (longestEdge !in 1..Image.MAX_EDGE * 4)
            throw BadInput("longest edge: $longestEdge pixels, want 1 to ${Image.MAX_EDGE * 4}")
        return ImageSettings(tileSize, longestEdge, split, resize, factor, mean, std)
    }

    companion object {
        private const val LANCZOS = 1 // Pillow's number

        /** Reads preprocessor_config.json. Throws BadInput for what this port does not do, another filter among it. */
        fun parse(json: Json): ImageSettings {
            fun flag(key: String) = json.find(key)?.boolean() ?: true
            fun triple(key: String): List<Double> {
                val values = json[key].items().map { it.double() }
                if (values.size != 3 || values.any { !(it > -1e9 && it < 1e9) })
                    throw BadInput("${json[key].where} is $values, want three numbers")
                return values
            }
            for (key in listOf("do_rescale", "do_normalize", "do_convert_rgb"))
                if (!flag(key)) throw BadInput("${json.where}: $key is false, only true is supported")
            val std = triple("image_std")
            if (std.any { it.toFloat() <= 0 }) throw BadInput("${json["image_std"].where} is $std, want positive numbers")
            json.find("resample")?.let {
                if (it.long() != LANCZOS.toLong()) throw BadInput("${it.where} is ${it.long()}, want $LANCZOS (Lanczos)")
            }
            val factor = json.find("rescale_factor")?.double() ?: (1.0 / 255)
            if (!(factor > 0 && factor <= 1)) throw BadInput("${json.where}: rescale_factor is $factor, want a number in (0, 1]")
            return ImageSettings(
                tileSize = json["max_image_size"]["longest_edge"].int(1, Image.MAX_EDGE),
                longestEdge = json["size"]["longest_edge"].int(1, Image.MAX_EDGE * 4),
                split = flag("do_image_splitting"),
                resize = flag("do_resize"),
                factor = factor,
                mean = triple("image_mean"),
                std = std,
            )
        }
    }
}

/** Image -> tiles of bytes -> floats, equal bit for bit to Hugging Face's Pillow processor for SmolVLM. */
object Image {
    const val MAX_EDGE = 4096 // no image is resized beyond this
    const val MAX_PIXELS = 178_956_970L // above this an image is refused, as Pillow does

    /** (width, height) with the longest edge at [longestEdge], the other made even, MAX_EDGE as a cap. */
    fun resizedSize(width: Int, height: Int, longestEdge: Int): Pair<Int, Int> {
        var w = longestEdge
        var h = longestEdge
        val aspect = width.toDouble() / height
        if (width >= height) {
            h = (longestEdge / aspect).toInt()
            h += h % 2
        } else {
            w = (longestEdge * aspect).toInt()
            w += w % 2
        }
        w = maxOf(w, 1)
        h = maxOf(h, 1)
        val resized = w.toDouble() / h
        if (w >= h && w > MAX_EDGE) {
            w = MAX_EDGE
            h = (MAX_EDGE / resized).toInt()
        } else if (h > w && h > MAX_EDGE) {
            w = (MAX_EDGE * resized).toInt()
            h = MAX_EDGE
        }
        return maxOf(w, 1) to maxOf(h, 1)
    }

    /** (width, height) with each side up to a multiple of [tile]. */
    fun gridSize(width: Int, height: Int, tile: Int): Pair<Int, Int> {
        fun up(side: Int) = (side + tile - 1) / tile * tile
        val aspect = width.toDouble() / height
        return if (width >= height) up(width).let { it to up((it / aspect).toInt()) }
        else up(height).let { up((it * aspect).toInt()) to it }
    }

    /** The tiles of an image: row by row, then the whole image as one tile. */
    fun cut(image: Rgb, settings: ImageSettings): Tiles {
        val tile = settings.tileSize
        var resized = image
        if (settings.resize) {
            val (w, h) = resizedSize(image.width, image.height, settings.longestEdge)
            resized = Lanczos.resize(image, w, h)
        }
        if (!settings.split) return Tiles(Lanczos.resize(resized, tile, tile).bytes, 0, 0)
        val (w, h) = gridSize(resized.width, resized.height, tile)
        if (w.toLong() * h > MAX_PIXELS) throw BadInput("an image of $w x $h pixels to be cut, want at most $MAX_PIXELS")
        resized = Lanczos.resize(resized, w, h)
        if (w <= tile && h <= tile) return Tiles(resized.bytes, 0, 0)
        val rows = h / tile
        val cols = w / tile
        val area = tile * tile * 3
        val out = ByteArray(Math.multiplyExact(rows * cols + 1, area))
        for (r in 0 until rows) for (c in 0 until cols) for (y in 0 until tile) {
            val from = ((r * tile + y) * w + c * tile) * 3
            resized.bytes.copyInto(out, (r * cols + c) * area + y * tile * 3, from, from + tile * 3)
        }
        Lanczos.resize(resized, tile, tile).bytes.copyInto(out, rows * cols * area)
        return Tiles(out, rows, cols)
    }

    /**
     * u8 [N, S, S, 3] -> f32 [N, 3, S, S]: the byte times the factor in float64, rounded to float32; then minus the mean and
     * divided by std in float32.
     */
    fun normalize(tiles: ByteArray, settings: ImageSettings): FloatArray {
        val area = settings.tileSize * settings.tileSize
        val out = FloatArray(tiles.size)
        for (channel in 0 until 3) {
            val mean = settings.mean[channel].toFloat()
            val std = settings.std[channel].toFloat()
            val table = FloatArray(256) { ((it * settings.factor).toFloat() - mean) / std }
            for (tile in 0 until tiles.size / (area * 3)) for (i in 0 until area)
                out[(tile * 3 + channel) * area + i] = table[tiles[(tile * area + i) * 3 + channel].toInt() and 255]
        }
        return out
    }
}

/** Pillow's resize with the Lanczos filter, in its arithmetic: weights of 22 bits, a pass along rows and one along columns. */
object Lanczos {
    private const val BITS = 22
    private const val SUPPORT = 3.0

    /** The weights of each output position: it is the sum over [first] ... of the source's values. */
    private class Weights(val first: IntArray, val values: Array<IntArray>)

    /** Each pass rounds to bytes, so their order shows: Pillow 13 begins with the columns where that drops many more rows. */
    fun resize(image: Rgb, width: Int, height: Int): Rgb {
        val rowsLost = image.height - height
        val columnsFirst = rowsLost > 0 && rowsLost > 2 * (image.width - width)
        var out = if (columnsFirst) columns(image, height) else image
        out = rows(out, width)
        return columns(out, height)
    }

    private fun rows(image: Rgb, out: Int): Rgb {
        if (out == image.width) return image
        val bytes = image.bytes
        val width = image.width
        val height = image.height
        val weights = weights(width, out)
        val result = ByteArray(out * height * 3)
        for (y in 0 until height) for (x in 0 until out) {
            val values = weights.values[x]
            val start = (y * width + weights.first[x]) * 3
            for (channel in 0 until 3) {
                var sum = 1 shl BITS - 1
                for (i in values.indices) sum += (bytes[start + i * 3 + channel].toInt() and 255) * values[i]
                result[(y * out + x) * 3 + channel] = (sum shr BITS).coerceIn(0, 255).toByte()
            }
        }
        return Rgb(out, height, result)
    }

    private fun columns(image: Rgb, out: Int): Rgb {
        if (out == image.height) return image
        val weights = weights(image.height, out)
        val bytes = image.bytes
        val stride = image.width * 3
        val result = ByteArray(stride * out)
        val sums = IntArray(stride)
        for (y in 0 until out) {
            sums.fill(1 shl BITS - 1)
            for ((i, weight) in weights.values[y].withIndex()) {
                val start = (weights.first[y] + i) * stride
                for (x in 0 until stride) sums[x] += (bytes[start + x].toInt() and 255) * weight
            }
            for (x in 0 until stride) result[y * stride + x] = (sums[x] shr BITS).coerceIn(0, 255).toByte()
        }
        return Rgb(image.width, out, result)
    }

    private fun weights(size: Int, out: Int): Weights {
        val scale = size.toDouble() / out
        val stretch = maxOf(scale, 1.0)
        val support = SUPPORT * stretch
        val first = IntArray(out)
        val values = Array(out) { x ->
            val center = (x + 0.5) * scale
            first[x] = maxOf((center - support + 0.5).toInt(), 0)
            val end = minOf((center + support + 0.5).toInt(), size)
            val raw = DoubleArray(end - first[x]) { filter((it + first[x] - center + 0.5) * (1.0 / stretch)) }
            var total = 0.0
            for (value in raw) total += value
            IntArray(raw.size) {
                val share = if (total != 0.0) raw[it] / total else raw[it]
                (share * (1 shl BITS) + if (share < 0) -0.5 else 0.5).toInt()
            }
        }
        return Weights(first, values)
    }

    private fun filter(x: Double): Double = if (x >= -SUPPORT && x < SUPPORT) sinc(x) * sinc(x / SUPPORT) else 0.0

    private fun sinc(x: Double): Double {
        if (x == 0.0) return 1.0
        val angle = x * Math.PI
        return StrictMath.sin(angle) / angle // strict: the same on every system
    }
}
