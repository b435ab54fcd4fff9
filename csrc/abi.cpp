// Version of the C interface. Python compares it before it calls anything else, so that a library left over from
// another checkout is refused rather than called with the wrong arguments. Raise it with every change of a signature.
extern "C" int fdk_abi(void) { return 4; }
