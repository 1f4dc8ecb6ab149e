// From the blocks of a file to a tile (format.h).
#pragma once
#include <cstddef>
#include <cstdint>

#include "format.h"

namespace squall {

// Packs 16 rows of `cols` columns, a multiple of the format's block. `to` is zeroed memory; what a
// last, broken chunk lacks stays zero. `next` is what this thread will probably read after these
// rows, as many bytes; it is fetched into the cache meanwhile, and need not exist.
void pack_tile(Format format, const uint8_t* const* rows, size_t cols, uint8_t* to,
               const uint8_t* next);

}  // namespace squall
