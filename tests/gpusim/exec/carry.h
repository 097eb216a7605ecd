// The forms of add, sub and mad that set or read the carry.
#pragma once
#include "decoder.h"

namespace gpusim {

void decode_carry(Decoder& d, const Statement& s, Instr& i);

}  // namespace gpusim
