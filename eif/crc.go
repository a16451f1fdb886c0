package eif

import "hash/crc32"

// combineCRC returns the CRC-32 (IEEE) of two runs of bytes, one behind the other, from the sums of
// both and the length of the second: the first sum, multiplied by x to the number of bits of the
// second run modulo the polynomial, plus the second (zlib, crc32_combine).
func combineCRC(first, second uint32, secondSize uint64) uint32 {
	power := uint32(1) << 31  // x to the 0: the highest bit is the lowest power
	square := uint32(1) << 23 // x to the 8, one byte, squared again and again
	for ; secondSize > 0; secondSize >>= 1 {
		if secondSize&1 != 0 {
			power = multiplyCRC(power, square)
		}
		square = multiplyCRC(square, square)
	}
	return multiplyCRC(power, first) ^ second
}

// multiplyCRC multiplies two polynomials over GF(2) modulo that of CRC-32, with their bits reversed.
func multiplyCRC(a, b uint32) uint32 {
	var product uint32
	for ; a != 0; a <<= 1 {
		if a&(1<<31) != 0 {
			product ^= b
		}
		carry := b & 1
		b >>= 1
		if carry != 0 {
			b ^= crc32.IEEE
		}
	}
	return product
}
