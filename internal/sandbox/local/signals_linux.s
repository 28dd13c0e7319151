#include "textflag.h"

// func nothing()
// A signal handler that returns.
TEXT ·nothing(SB),NOSPLIT|NOFRAME,$0
	RET

DATA ·nothingAt+0(SB)/8, $·nothing(SB)
GLOBL ·nothingAt(SB), RODATA, $8
