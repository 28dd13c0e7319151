package sandbox

// ValidID reports whether id can be the key of a sandbox or the id of a
// process: 1 to 64 of the characters a-z, 0-9, dot, dash and underscore.
// "." and ".." are valid, so an id is never a file name by itself.
func ValidID(id string) bool {
	if len(id) == 0 || len(id) > 64 {
		return false
	}
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}
