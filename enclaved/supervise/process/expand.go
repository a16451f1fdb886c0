package process

import "strings"

// expand replaces $(NAME) in s by the value that lookup knows, as the kubelet does in commands,
// arguments and environment values: an unknown name stays as it is written, "$$" is one "$", so that
// $$(NAME) stays $(NAME), and everything else after a "$" means itself.
func expand(s string, lookup func(name string) (string, bool)) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, '$')
		// A "$" at the very end means itself.
		if i < 0 || i+1 == len(s) {
			b.WriteString(s)
			return b.String()
		}
		b.WriteString(s[:i])
		next := s[i+1]
		s = s[i+2:]
		switch next {
		case '$':
			b.WriteByte('$')
		case '(':
			end := strings.IndexByte(s, ')')
			if end < 0 { // never closed: only these two characters mean themselves
				b.WriteString("$(")
				continue
			}
			if v, ok := lookup(s[:end]); ok {
				b.WriteString(v)
			} else {
				b.WriteString("$(" + s[:end+1])
			}
			s = s[end+1:]
		default:
			b.WriteByte('$')
			b.WriteByte(next)
		}
	}
}
