// Bulk copies: cp.async.bulk, plain and with a tensor map.
#pragma once
#include "../exec/decoder.h"

namespace gpusim {

void decode_bulk(Decoder& d, const Statement& s, Instr& i);

}  // namespace gpusim
