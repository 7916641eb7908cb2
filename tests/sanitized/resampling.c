/* Calls everything in resample.c with images of random sizes, in memory that ends where the image does. */

#include <stdio.h>

#include "resample.c"

static uint64_t state;

static uint32_t chance(uint32_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

static uint8_t *noise(size_t bytes) {
    uint8_t *made = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) made[i] = chance(256);
    return made;
}

static int side(void) { return 1 + chance(chance(4) ? 40 : 400); }

static void resize_once(void) {
    int height = side(), width = side(), to_height = side(), to_width = side();
    int top = chance(to_height), left = chance(to_width), rows = 1 + chance(to_height - top);
    int columns = 1 + chance(to_width - left);
    int64_t row_bytes = (int64_t)width * CHANNELS + (chance(2) ? chance(20) : 0);
    uint8_t *image = noise((size_t)(row_bytes * (height - 1) + (int64_t)width * CHANNELS));
    uint8_t *out = malloc((size_t)rows * columns * CHANNELS);
    if (!resize(image, row_bytes, height, width, out, to_height, to_width, top, left, rows, columns, chance(2))) abort();
    free(image);
    free(out);
}

static double some(double most) { return ((double)chance(1 << 30) / (1 << 29) - 1) * most; }

static void affine_once(void) {
    int height = side(), width = side(), bytes = height * width * CHANNELS;
    double matrix[6] = {some(3), some(3), some(2.0 * width), some(3), some(3), some(2.0 * height)};
    if (!chance(4)) matrix[0] = matrix[4] = 1, matrix[1] = matrix[3] = 0;
    if (!chance(20)) matrix[chance(6)] = chance(2) ? 1e300 : NAN;
    uint8_t *image = noise(bytes), *out = malloc(bytes);
    uint8_t fill[3] = {chance(256), chance(256), chance(256)};
    if (!affine(image, height, width, out, matrix, chance(2), fill)) abort();
    mirror(image, (int64_t)height * width, width, out);
    free(image);
    free(out);
}

int main(int count, char **arguments) {
    int turns = atoi(arguments[1]);
    state = strtoull(arguments[2], NULL, 10);
    for (int turn = 0; turn < turns; turn++) {
        resize_once();
        affine_once();
    }
    printf("%d images\n", 2 * turns);
    return count != 3;
}
