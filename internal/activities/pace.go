package activities

import (
	"sync"
	"time"
)

const (
	pollEvery  = 250 * time.Millisecond
	pollAtMost = 2 * time.Second // between two looks at an agent far away that says nothing
)

// A pace says how long to wait before an agent's output is looked at again. On
// this host a look costs next to nothing. Far away it is a request, and most
// agents say something once in several seconds: who has spoken is looked at
// soon again, as there is often more to come and an agent's last words come
// just before its end, and who is silent less and less often.
type pace struct {
	most time.Duration // 0: always soon
	wait time.Duration
	read int64
}

// next returns how long to wait when so much has been read of the output.
func (p *pace) next(read int64) time.Duration {
	if p.wait == 0 || read != p.read {
		p.wait = pollEvery
	} else {
		p.wait = max(min(4*p.wait, p.most), pollEvery)
	}
	p.read = read
	return p.wait
}

// wait is until the next look: soon enough for what is late. All forks far away
// are looked at in the same moments: a worker that is woken for each of them
// alone spends more on waking than on looking.
func (f *follower) wait(now time.Time) time.Duration {
	wait := f.pace.next(f.offset)
	if f.pace.most > 0 {
		wait = now.Add(wait).Round(pollEvery).Sub(now)
	}
	return min(wait, f.left(now))
}

// pieces are what output is read into, which is mostly nothing.
var pieces = sync.Pool{New: func() any { return new([64 << 10]byte) }}
