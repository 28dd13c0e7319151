package agent

import "bytes"

// maxLine bounds what is held of one line. Claude Code writes the answer of a
// tool on one line, and those are some 100 KB at most.
const maxLine = 1 << 20

// Lines splits a stream that arrives in pieces into lines. The zero value is
// ready. It holds at most 1 MiB of an unfinished line; what a line has more
// is dropped. It is not safe for concurrent use.
type Lines struct {
	begun    []byte // the unfinished line, at most maxLine bytes
	pending  int64  // length of the unfinished line, with what was dropped
	consumed int64
}

// Feed takes the next piece and calls yield with every line that p completes,
// without its newline. The slice is valid until yield returns.
func (l *Lines) Feed(p []byte, yield func(line []byte)) {
	for {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			l.keep(p)
			return
		}
		line := p[:min(i, maxLine)]
		if l.pending > 0 {
			l.keep(p[:i])
			line = l.begun
		} else {
			l.pending = int64(i)
		}
		l.consumed += l.pending + 1
		l.pending = 0
		l.begun = l.begun[:0]
		yield(line)
		p = p[i+1:]
	}
}

func (l *Lines) keep(p []byte) {
	l.pending += int64(len(p))
	l.begun = append(l.begun, p[:min(len(p), maxLine-len(l.begun))]...)
}

// Flush calls yield with the unfinished line, when there is one: the stream
// has ended. A second call does nothing.
func (l *Lines) Flush(yield func(line []byte)) {
	if l.pending == 0 {
		return
	}
	line := l.begun
	l.consumed += l.pending
	l.pending = 0
	l.begun = l.begun[:0]
	yield(line)
}

// Consumed returns how many bytes of the stream were yielded as lines, with
// their newlines and with what was dropped of them. Whoever reads the stream
// again from there, with new Lines, misses nothing and sees no line twice.
func (l *Lines) Consumed() int64 { return l.consumed }
