/* A crop's pixels from a JPEG or from decoded pixels, resized as Pillow resizes them; everything here runs without the GIL.
 *
 * Where it stands: `pixels.py` calls `resize` or `decode_resize`. It has the same from simplejpeg and Pillow for machines where this was not built,
 * and takes Pillow for whatever is refused here.
 *
 * Invariants
 * - `resize` equals Pillow's Image.resize bit for bit. Pillow resamples 8 bits a sample in integers (Resample.c, ImagingResample...8bpc): along
 *   one axis, then the other, each rounded to 8 bits; weights are rounded to 22 bits. Which axis comes first is the caller's affair. Integer
 *   sums do not depend on their order, so the AVX2 kernels and the plain C beside them give the same. AVX2 multiplies and adds 16 bits in one
 *   instruction, so a weight is high * 2048 + low there.
 * - `decode_resize` decodes the rows and columns that the weights touch, and one iMCU around them: chroma is upsampled from its neighbours, so
 *   those are the same as in a decoding of the whole. libjpeg-turbo's warnings are errors here, and an error is told by False, never more.
 * - Nothing is read outside the buffers whatever the bytes and the arguments say; all that is allocated is freed.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef WITH_JPEG
#include <setjmp.h>
#include <stdio.h>

#include <jpeglib.h>
#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "jpeg_crop_scanline of libjpeg-turbo 2.1 or later is needed"
#endif
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define WITH_AVX2
#include <immintrin.h>
#endif

enum { BITS = 22, LOW_BITS = 11, LOW = (1 << LOW_BITS) - 1, PAD = 64, BATCH = 16 };
static int use_avx2 = 0;

/* ---------------------------------------------------------------------------------------------------------------------- weights */

typedef struct {
    int count;         /* outputs */
    int size;          /* places for weights an output, a multiple of 4; those not used are 0 */
    int begin, end;    /* the inputs that all of them touch */
    int *first, *used; /* count; used >= 1 */
    int32_t *weights;  /* count x size */
    int32_t *halves;   /* for rows_avx2, two of 16 bits in one: of every four weights the high halves, then the low halves */
} Weights;

static double bilinear(double x) {
    if (x < 0.0) x = -x;
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) {
#define A -0.5
    if (x < 0.0) x = -x;
    if (x < 1.0) return ((A + 2.0) * x - (A + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * A;
    return 0.0;
#undef A
}

static void free_weights(Weights *w) {
    free(w->first);
    free(w->weights);
    free(w->halves);
}

/* Pillow's precompute_coeffs for the outputs offset .. offset + count of out_size; mirrored: the last one first. 0 where memory is short;
 * free_weights may be called in any case. */
static int make_weights(Weights *w, int in_size, double in0, double in1, int out_size, int offset, int count, int cubic, int mirrored) {
    double scale = (in1 - in0) / out_size, filterscale = scale < 1.0 ? 1.0 : scale;
    double support = (cubic ? 2.0 : 1.0) * filterscale, ss = 1.0 / filterscale;
    int most = 1;
    memset(w, 0, sizeof *w);
    w->count = count;
    w->begin = in_size;
    w->first = calloc(2 * (size_t)count, sizeof(int));
    if (!w->first) return 0;
    w->used = w->first + count;
    for (int i = 0; i < count; i++) {
        int at = mirrored ? count - 1 - i : i;
        double center = in0 + (offset + i + 0.5) * scale;
        int xmin = (int)(center - support + 0.5), xmax = (int)(center + support + 0.5);
        if (xmin < 0) xmin = 0;
        if (xmax > in_size) xmax = in_size;
        w->first[at] = xmin;
        w->used[at] = xmax - xmin;
        if (xmax - xmin > most) most = xmax - xmin;
        if (xmin < w->begin) w->begin = xmin;
        if (xmax > w->end) w->end = xmax;
    }
    w->size = (most + 3) / 4 * 4;
    w->weights = calloc((size_t)count * w->size, sizeof(int32_t));
    w->halves = calloc((size_t)count * w->size, sizeof(int32_t));
    double *k = malloc(most * sizeof(double));
    if (!w->weights || !w->halves || !k) {
        free(k);
        return 0;
    }
    for (int i = 0; i < count; i++) {
        int at = mirrored ? count - 1 - i : i, used = w->used[at];
        double center = in0 + (offset + i + 0.5) * scale, total = 0.0;
        for (int x = 0; x < used; x++) {
            double place = (x + w->first[at] - center + 0.5) * ss; /* in Pillow's order, as each step rounds */
            k[x] = cubic ? bicubic(place) : bilinear(place);
            total += k[x];
        }
        int32_t *weights = w->weights + (size_t)at * w->size;
        int32_t *halves = w->halves + (size_t)at * w->size;
        for (int x = 0; x < used; x++) {
            if (total != 0.0) k[x] /= total;
            int32_t fixed = (int)((k[x] < 0 ? -0.5 : 0.5) + k[x] * (1 << BITS));
            weights[x] = fixed;
            int shift = 16 * (x % 2);
            halves[x / 4 * 4 + x % 4 / 2] |= (int32_t)(((uint32_t)(fixed >> LOW_BITS) & 0xFFFF) << shift);
            halves[x / 4 * 4 + x % 4 / 2 + 2] |= (fixed & LOW) << shift;
        }
    }
    free(k);
    return 1;
}

/* ------------------------------------------------------------------------------------------------------------- the two passes */

static inline uint8_t clip8(int32_t sum) {
    sum >>= BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : (uint8_t)sum;
}

static void row_plain(const Weights *w, const uint8_t *row, uint8_t *out) {
    for (int i = 0; i < w->count; i++) {
        const uint8_t *in = row + 3 * (size_t)(w->first[i] - w->begin);
        const int32_t *k = w->weights + (size_t)i * w->size;
        int32_t r = 1 << (BITS - 1), g = r, b = r;
        for (int x = 0; x < w->used[i]; x++) {
            r += in[3 * x] * k[x];
            g += in[3 * x + 1] * k[x];
            b += in[3 * x + 2] * k[x];
        }
        out[3 * i] = clip8(r);
        out[3 * i + 1] = clip8(g);
        out[3 * i + 2] = clip8(b);
    }
}

/* `count` rows of RGB pixels, of which the first is number `begin`, to w->count RGB pixels each. */
static void rows_plain(const Weights *w, const uint8_t *rows, size_t stride, uint8_t *out, size_t out_stride, int count) {
    for (int y = 0; y < count; y++) row_plain(w, rows + y * stride, out + y * out_stride);
}

/* Output row i of `bytes` bytes from rows that lie `stride` apart, of which the first is number `begin`. */
static void column_plain(const Weights *w, int i, const uint8_t *rows, size_t stride, uint8_t *out, int bytes) {
    const uint8_t *in = rows + (w->first[i] - w->begin) * stride;
    const int32_t *k = w->weights + (size_t)i * w->size;
    int32_t sums[256];
    for (int start = 0; start < bytes; start += 256) {
        int n = bytes - start < 256 ? bytes - start : 256;
        for (int j = 0; j < n; j++) sums[j] = 1 << (BITS - 1);
        for (int y = 0; y < w->used[i]; y++) {
            const uint8_t *line = in + y * stride + start;
            for (int j = 0; j < n; j++) sums[j] += line[j] * k[y];
        }
        for (int j = 0; j < n; j++) out[start + j] = clip8(sums[j]);
    }
}

#ifdef WITH_AVX2
#define AVX2 __attribute__((target("avx2")))

/* From four weights for the four pixels at a and the four at b to the sums of R, G, B (and nothing) of a and of b. */
AVX2 static inline void add_four(const uint8_t *a, const uint8_t *b, const int32_t *halves, __m256i *high, __m256i *low) {
    const __m256i first = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                           0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m256i second = _mm256_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,
                                            6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    __m256i four = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a)), _mm_loadu_si128((const __m128i *)b), 1);
    __m256i v0 = _mm256_shuffle_epi8(four, first), v1 = _mm256_shuffle_epi8(four, second);
    *high = _mm256_add_epi32(*high, _mm256_madd_epi16(v0, _mm256_set1_epi32(halves[0])));
    *high = _mm256_add_epi32(*high, _mm256_madd_epi16(v1, _mm256_set1_epi32(halves[1])));
    *low = _mm256_add_epi32(*low, _mm256_madd_epi16(v0, _mm256_set1_epi32(halves[2])));
    *low = _mm256_add_epi32(*low, _mm256_madd_epi16(v1, _mm256_set1_epi32(halves[3])));
}

/* As rows_plain, four rows at a time; reads up to 3 * w->size + 4 bytes behind a row, which mean nothing, and writes one behind each of `out`. */
AVX2 static void rows_avx2(const Weights *w, const uint8_t *rows, size_t stride, uint8_t *out, size_t out_stride, int count) {
    const int outputs = w->count, size = w->size, begin = w->begin, *first = w->first; /* `out` might be taken for an alias of them */
    for (int y = 0; y < count; y += 4) {
        const int32_t *halves = w->halves;
        const uint8_t *in[4];
        uint8_t *to[4];
        for (int j = 0; j < 4; j++) { /* the last one again where there are no four */
            in[j] = rows + (y + j < count ? y + j : count - 1) * stride;
            to[j] = out + (y + j < count ? y + j : count - 1) * out_stride;
        }
        for (int i = 0; i < outputs; i++, halves += size) {
            size_t at = 3 * (size_t)(first[i] - begin);
            __m256i high01 = _mm256_setzero_si256(), high23 = high01, low01 = _mm256_set1_epi32(1 << (BITS - 1)), low23 = low01;
            for (int x = 0; x < size; x += 4, at += 12) {
                add_four(in[0] + at, in[1] + at, halves + x, &high01, &low01);
                add_four(in[2] + at, in[3] + at, halves + x, &high23, &low23);
            }
            __m256i p01 = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high01, LOW_BITS), low01), BITS);
            __m256i p23 = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high23, LOW_BITS), low23), BITS);
            __m256i words = _mm256_packs_epi32(p01, p23); /* of rows 0, 2 and 1, 3 */
            __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
            int32_t pixels[4] = {_mm_cvtsi128_si32(bytes), _mm_extract_epi32(bytes, 2), _mm_extract_epi32(bytes, 1), _mm_extract_epi32(bytes, 3)};
            for (int j = 0; j < 4; j++) memcpy(to[j] + 3 * i, &pixels[j], 4);
        }
    }
}

/* As column_plain; rows may be read up to 31 bytes behind `bytes`. */
AVX2 static void column_avx2(const Weights *w, int i, const uint8_t *rows, size_t stride, uint8_t *out, int bytes) {
    const uint8_t *in = rows + (w->first[i] - w->begin) * stride;
    const int32_t *k = w->weights + (size_t)i * w->size;
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (BITS - 1));
    int used = w->used[i];
    for (int j = 0; j < bytes; j += 32) {
        __m256i high[4] = {zero, zero, zero, zero}, low[4] = {half, half, half, half};
        for (int y = 0; y < used; y += 2) {
            const uint8_t *line = in + y * stride + j;
            int32_t k0 = k[y], k1 = y + 1 < used ? k[y + 1] : 0;
            __m256i a = _mm256_loadu_si256((const __m256i *)line);
            __m256i b = y + 1 < used ? _mm256_loadu_si256((const __m256i *)(line + stride)) : zero;
            __m256i k_high = _mm256_set1_epi32((int32_t)(((uint32_t)(k1 >> LOW_BITS) << 16) | ((uint32_t)(k0 >> LOW_BITS) & 0xFFFF)));
            __m256i k_low = _mm256_set1_epi32(((k1 & LOW) << 16) | (k0 & LOW));
            __m256i ab[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
            for (int h = 0; h < 2; h++) {
                __m256i v0 = _mm256_unpacklo_epi8(ab[h], zero), v1 = _mm256_unpackhi_epi8(ab[h], zero);
                high[2 * h] = _mm256_add_epi32(high[2 * h], _mm256_madd_epi16(v0, k_high));
                low[2 * h] = _mm256_add_epi32(low[2 * h], _mm256_madd_epi16(v0, k_low));
                high[2 * h + 1] = _mm256_add_epi32(high[2 * h + 1], _mm256_madd_epi16(v1, k_high));
                low[2 * h + 1] = _mm256_add_epi32(low[2 * h + 1], _mm256_madd_epi16(v1, k_low));
            }
        }
        __m256i sum[4];
        for (int q = 0; q < 4; q++) sum[q] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high[q], LOW_BITS), low[q]), BITS);
        __m256i result = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
        if (bytes - j >= 32) {
            _mm256_storeu_si256((__m256i *)(out + j), result);
        } else {
            uint8_t last[32];
            _mm256_storeu_si256((__m256i *)last, result);
            memcpy(out + j, last, bytes - j);
        }
    }
}
#endif

static void resize_rows(const Weights *w, const uint8_t *rows, size_t stride, uint8_t *out, size_t out_stride, int count) {
#ifdef WITH_AVX2
    if (use_avx2) {
        rows_avx2(w, rows, stride, out, out_stride, count);
        return;
    }
#endif
    rows_plain(w, rows, stride, out, out_stride, count);
}

static void resize_column(const Weights *w, int i, const uint8_t *rows, size_t stride, uint8_t *out, int bytes) {
#ifdef WITH_AVX2
    if (use_avx2) {
        column_avx2(w, i, rows, stride, out, bytes);
        return;
    }
#endif
    column_plain(w, i, rows, stride, out, bytes);
}

/* ---------------------------------------------------------------------------------------------------------- what is asked for */

typedef struct {
    int left, top, right, bottom;         /* the region of the (scaled) picture that counts as the picture */
    double x0, y0, x1, y1;                /* the box of the region that is resized */
    int width, height;                    /* to this size */
    int x, y;                             /* of which the window that begins here and has out's size is written */
    int cubic, mirrored, rows_first;      /* rows_first: along x, then along y */
    int out_width, out_height;
    uint8_t *out;
    Weights columns, rows;                /* of x and of y */
    uint8_t *batch, *kept;                /* BATCH rows, twice; what is kept of all rows for the second pass, or for both */
    size_t batch_stride, stride;
} Cut;

static void free_cut(Cut *cut) {
    free_weights(&cut->columns);
    free_weights(&cut->rows);
    free(cut->batch);
    free(cut->kept);
}

/* 0 where memory is short; free_cut may be called in any case. decoded_width: pixels that a row of the picture may have. */
static int prepare(Cut *cut, int decoded_width) {
    int w = cut->right - cut->left, h = cut->bottom - cut->top;
    memset(&cut->columns, 0, sizeof cut->columns);
    memset(&cut->rows, 0, sizeof cut->rows);
    cut->batch = cut->kept = NULL;
    if (!make_weights(&cut->columns, w, cut->x0, cut->x1, cut->width, cut->x, cut->out_width, cut->cubic, cut->mirrored)) return 0;
    if (!make_weights(&cut->rows, h, cut->y0, cut->y1, cut->height, cut->y, cut->out_height, cut->cubic, 0)) return 0;
    int width = cut->rows_first ? cut->out_width : cut->columns.end - cut->columns.begin;
    int widest = decoded_width > cut->out_width ? decoded_width : cut->out_width;
    cut->batch_stride = 3 * (size_t)widest + PAD;
    cut->stride = 3 * (size_t)width + PAD;
    cut->batch = malloc(2 * BATCH * cut->batch_stride + 3 * (size_t)cut->columns.size);
    cut->kept = malloc(cut->stride * (cut->rows.end - cut->rows.begin) + PAD);
    return cut->batch && cut->kept;
}

/* Takes rows y .. y + count of the region; `rows`, which lie in the batch, begin with column columns.begin of it. */
static void take_rows(Cut *cut, int y, const uint8_t *rows, int count) {
    uint8_t *kept = cut->kept + (y - cut->rows.begin) * cut->stride;
    if (cut->rows_first) {
        resize_rows(&cut->columns, rows, cut->batch_stride, kept, cut->stride, count);
    } else {
        size_t bytes = 3 * (size_t)(cut->columns.end - cut->columns.begin);
        for (int i = 0; i < count; i++) memcpy(kept + i * cut->stride, rows + i * cut->batch_stride, bytes);
    }
}

/* After the last row. */
static void finish(Cut *cut) {
    int bytes = 3 * cut->out_width, width = 3 * (cut->columns.end - cut->columns.begin);
    uint8_t *second = cut->batch + BATCH * cut->batch_stride;
    for (int y = 0; y < cut->out_height; y += BATCH) {
        int count = cut->out_height - y < BATCH ? cut->out_height - y : BATCH;
        uint8_t *out = cut->out + (size_t)y * bytes;
        if (cut->rows_first) {
            for (int i = 0; i < count; i++) resize_column(&cut->rows, y + i, cut->kept, cut->stride, out + (size_t)i * bytes, bytes);
        } else {
            for (int i = 0; i < count; i++)
                resize_column(&cut->rows, y + i, cut->kept, cut->stride, cut->batch + i * cut->batch_stride, width);
            resize_rows(&cut->columns, cut->batch, cut->batch_stride, second, cut->batch_stride, count);
            for (int i = 0; i < count; i++) memcpy(out + (size_t)i * bytes, second + i * cut->batch_stride, bytes);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------------ JPEG */

#ifdef WITH_JPEG
typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf back;
} Errors;

static void leave(j_common_ptr jpeg) { longjmp(((Errors *)jpeg->err)->back, 1); }

static void leave_on_warning(j_common_ptr jpeg, int level) {
    if (level < 0) leave(jpeg);
}

static void say_nothing(j_common_ptr jpeg) { (void)jpeg; }

/* Whether bits are missing that a later scan would have brought: libjpeg then smooths over blocks that a region does not have. */
static int is_unfinished(j_decompress_ptr jpeg) {
    if (!jpeg->progressive_mode || !jpeg->coef_bits) return 0;
    for (int c = 0; c < jpeg->num_components; c++)
        for (int k = 0; k < DCTSIZE2; k++)
            if (jpeg->coef_bits[c][k] != 0) return 1;
    return 0;
}

/* All of a picture of width x height up to the last row that is needed; 1 if it went well. */
static int decode(Cut *cut, const uint8_t *data, size_t size, int width, int height, int denominator) {
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    memset(&jpeg, 0, sizeof jpeg); /* so that an error before it is set up finds nothing to free */
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = leave;
    errors.base.emit_message = leave_on_warning;
    errors.base.output_message = say_nothing;
    if (setjmp(errors.back)) {
        jpeg_destroy_decompress(&jpeg);
        return 0;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, size);
    jpeg_read_header(&jpeg, TRUE);
    if ((int)jpeg.image_width != width || (int)jpeg.image_height != height || jpeg.data_precision != 8 ||
        (jpeg.jpeg_color_space != JCS_YCbCr && jpeg.jpeg_color_space != JCS_GRAYSCALE))
        leave((j_common_ptr)&jpeg);
    jpeg.out_color_space = JCS_RGB;
    jpeg.scale_num = 1;
    jpeg.scale_denom = denominator;
    jpeg.dct_method = JDCT_ISLOW;
    jpeg.do_fancy_upsampling = TRUE; /* the merged one is no faster where only a region is decoded */
    jpeg_start_decompress(&jpeg);
    if ((int)jpeg.output_width < cut->right || (int)jpeg.output_height < cut->bottom || is_unfinished(&jpeg)) leave((j_common_ptr)&jpeg);

    int block = DCTSIZE / denominator; /* of the decoded picture; an iMCU is at most two */
    int begin = cut->left + cut->columns.begin, end = cut->left + cut->columns.end;
    JDIMENSION left = begin > 2 * block ? begin - 2 * block : 0;
    JDIMENSION right = end + 2 * block < (int)jpeg.output_width ? (JDIMENSION)(end + 2 * block) : jpeg.output_width;
    JDIMENSION columns = right - left;
    if (left > 0 || right < jpeg.output_width) jpeg_crop_scanline(&jpeg, &left, &columns);
    if ((int)left > begin || (int)(left + columns) < end || jpeg.output_width < columns) leave((j_common_ptr)&jpeg);

    int top = cut->top + cut->rows.begin;
    int skipped = top > 2 * block ? top - 2 * block : 0;
    if (skipped && (int)jpeg_skip_scanlines(&jpeg, skipped) != skipped) leave((j_common_ptr)&jpeg);
    uint8_t *rows = cut->batch + 3 * (size_t)(begin - (int)left);
    int bottom = cut->top + cut->rows.end;
    for (int y = skipped, held = 0; y < bottom; y++) {
        JSAMPROW row = cut->batch + held * cut->batch_stride;
        if (jpeg_read_scanlines(&jpeg, &row, 1) != 1) leave((j_common_ptr)&jpeg);
        if (y >= top) held++;
        if (held == BATCH || y + 1 == bottom) {
            take_rows(cut, y + 1 - held - cut->top, rows, held);
            held = 0;
        }
    }
    if (jpeg.output_scanline == jpeg.output_height) jpeg_finish_decompress(&jpeg); /* which sees whether the end is in order */
    jpeg_destroy_decompress(&jpeg);
    return 1;
}
#endif

/* ---------------------------------------------------------------------------------------------------------------------- Python */

/* What both functions check of a cut before they trust it. */
static int is_sound(const Cut *cut, long width, long height) {
    int w = cut->right - cut->left, h = cut->bottom - cut->top;
    return 0 <= cut->left && cut->left < cut->right && cut->right <= width && 0 <= cut->top && cut->top < cut->bottom && cut->bottom <= height &&
           0 <= cut->x0 && cut->x0 < cut->x1 && cut->x1 <= w && 0 <= cut->y0 && cut->y0 < cut->y1 && cut->y1 <= h && cut->width > 0 &&
           cut->width <= 1 << 30 && cut->height > 0 && cut->height <= 1 << 30 && cut->out_width > 0 && cut->out_height > 0 && cut->x >= 0 &&
           cut->x <= cut->width - cut->out_width && cut->y >= 0 && cut->y <= cut->height - cut->out_height;
}

/* The buffer of out: contiguous bytes, (height, width, 3). */
static int open_out(PyObject *object, Py_buffer *view, Cut *cut) {
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) return 0;
    if (view->ndim != 3 || view->itemsize != 1 || view->shape[2] != 3 || view->shape[0] > 65535 || view->shape[1] > 65535) {
        PyBuffer_Release(view);
        PyErr_SetString(PyExc_TypeError, "out must be contiguous bytes, (height, width, 3)");
        return 0;
    }
    cut->out = view->buf;
    cut->out_height = (int)view->shape[0];
    cut->out_width = (int)view->shape[1];
    return 1;
}

#define CUT_FORMAT "(iiii)(dddd)(ii)(ii)ppp"
#define CUT_FIELDS(c) \
    &c.left, &c.top, &c.right, &c.bottom, &c.x0, &c.y0, &c.x1, &c.y1, &c.width, &c.height, &c.x, &c.y, &c.cubic, &c.mirrored, \
        &c.rows_first

PyDoc_STRVAR(resize_doc,
             "resize(out, pixels, region, box, size, at, cubic, mirrored, rows_first)\n--\n\n"
             "out[...] = the window at `at` of pixels[region] whose `box` is resized to `size`, as Pillow does it.");

static PyObject *resize(PyObject *module, PyObject *args) {
    PyObject *out_object, *in_object;
    Cut cut;
    Py_buffer out, in;
    (void)module;
    if (!PyArg_ParseTuple(args, "OO" CUT_FORMAT, &out_object, &in_object, CUT_FIELDS(cut))) return NULL;
    if (!open_out(out_object, &out, &cut)) return NULL;
    if (PyObject_GetBuffer(in_object, &in, PyBUF_C_CONTIGUOUS) < 0) {
        PyBuffer_Release(&out);
        return NULL;
    }
    int done = 0;
    if (in.ndim != 3 || in.itemsize != 1 || in.shape[2] != 3 || in.shape[0] > INT32_MAX || in.shape[1] > INT32_MAX / 4 ||
        !is_sound(&cut, (long)in.shape[1], (long)in.shape[0])) {
        PyErr_SetString(PyExc_RuntimeError, "the cut does not fit the pixels, contiguous bytes, (height, width, 3)");
    } else {
        Py_BEGIN_ALLOW_THREADS;
        if ((done = prepare(&cut, cut.right - cut.left))) {
            size_t stride = 3 * (size_t)in.shape[1], bytes = 3 * (size_t)(cut.columns.end - cut.columns.begin);
            const uint8_t *row = (const uint8_t *)in.buf + (cut.top + cut.rows.begin) * stride + 3 * (size_t)(cut.left + cut.columns.begin);
            for (int y = cut.rows.begin, count; y < cut.rows.end; y += count) {
                count = cut.rows.end - y < BATCH ? cut.rows.end - y : BATCH;
                for (int i = 0; i < count; i++, row += stride) memcpy(cut.batch + i * cut.batch_stride, row, bytes);
                take_rows(&cut, y, cut.batch, count);
            }
            finish(&cut);
        }
        free_cut(&cut);
        Py_END_ALLOW_THREADS;
        if (!done) PyErr_NoMemory();
    }
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    if (!done) return NULL;
    Py_RETURN_NONE;
}

#ifdef WITH_JPEG
PyDoc_STRVAR(decode_resize_doc,
             "decode_resize(out, data, width, height, denominator, region, box, size, at, cubic, mirrored, rows_first) -> bool\n--\n\n"
             "As resize, of the JPEG in data, which has that width and height and is decoded at 1/denominator; False: decode it otherwise.");

static PyObject *decode_resize(PyObject *module, PyObject *args) {
    PyObject *out_object;
    Cut cut;
    Py_buffer out, in;
    int width, height, denominator, done = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "Oy*iii" CUT_FORMAT, &out_object, &in, &width, &height, &denominator, CUT_FIELDS(cut))) return NULL;
    if (!open_out(out_object, &out, &cut)) {
        PyBuffer_Release(&in);
        return NULL;
    }
    if ((denominator != 1 && denominator != 2 && denominator != 4 && denominator != 8) || width < 1 || width > 65535 || height < 1 ||
        height > 65535 || !is_sound(&cut, (width + denominator - 1) / denominator, (height + denominator - 1) / denominator)) {
        PyErr_SetString(PyExc_RuntimeError, "the cut does not fit a picture of that size");
        done = -1;
    } else {
        Py_BEGIN_ALLOW_THREADS;
        if (prepare(&cut, width + 2 * DCTSIZE) && decode(&cut, in.buf, in.len, width, height, denominator)) {
            finish(&cut);
            done = 1;
        }
        free_cut(&cut);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    return done < 0 ? NULL : PyBool_FromLong(done);
}
#endif

PyDoc_STRVAR(avx2_doc, "avx2(wanted) -> bool\n--\n\nUse the AVX2 kernels from now on, if wanted and if the CPU has it; whether it will be so.");

static PyObject *avx2(PyObject *module, PyObject *wanted) {
    int yes = PyObject_IsTrue(wanted);
    (void)module;
    if (yes < 0) return NULL;
#ifdef WITH_AVX2
    use_avx2 = yes && __builtin_cpu_supports("avx2");
#endif
    return PyBool_FromLong(use_avx2);
}

static PyMethodDef methods[] = {
    {"resize", resize, METH_VARARGS, resize_doc},
#ifdef WITH_JPEG
    {"decode_resize", decode_resize, METH_VARARGS, decode_resize_doc},
#endif
    {"avx2", avx2, METH_O, avx2_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_pixels", "A crop's pixels, without the GIL.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pixels(void) {
    PyObject *module = PyModule_Create(&definition);
#ifdef WITH_AVX2
    __builtin_cpu_init();
    use_avx2 = __builtin_cpu_supports("avx2") != 0;
#endif
#ifdef WITH_JPEG
#define TEXT(x) #x
#define VALUE(x) TEXT(x)
    if (module && PyModule_AddStringConstant(module, "LIBJPEG_TURBO", VALUE(LIBJPEG_TURBO_VERSION)) < 0) {
        Py_DECREF(module);
        return NULL;
    }
#endif
    return module;
}
