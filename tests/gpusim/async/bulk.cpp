#include "bulk.h"

namespace gpusim {

void decode_bulk(Decoder&, const Statement&, Instr&) {}

}  // namespace gpusim
