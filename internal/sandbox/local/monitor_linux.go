package local

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A monitor answers git in the sandbox, which asks at [sandbox.ChangesPort]
// what can have changed in the workspace. It knows, because what differs from
// the base is in the sandbox's upper layer and nothing else is: the kernel
// copies a file up before it is changed, and leaves a whiteout of what is
// removed (Linux, Documentation/filesystems/overlayfs.rst).
//
// It looks only when it is asked, for one caller after the other. What it says
// is more than what has changed, never less; where it cannot be sure, it says
// that everything may have. Whoever lies to it deceives git in this sandbox,
// and nobody else.
type monitor struct {
	door  *door
	upper upperLayer
	based bool   // the sandbox stands on a base, and its upper layer can be read
	token string // of the index in that base; empty: it has none
	own   string
	log   *slog.Logger

	looking sync.Mutex // held for all that follows, and to look at the layer
	epoch   int        // tokens of earlier ones are not known any more
	idle    time.Time  // until when nobody looks, after too many files
	rested  time.Time  // likewise, after any look
}

const (
	// How long a caller may take to ask, and again to listen, and how many may
	// do so at once. More wait in the listener's queue.
	monitorPatience = 2 * time.Second
	maxCallers      = 32
	maxToken        = 200
	// After a look at too many files none is taken for so long: git's own takes
	// no longer then.
	monitorRest = time.Minute
)

// monitorTokenFile is where a base keeps the token of its index.
const monitorTokenFile = ".git/" + sandbox.ChangesToken

// newMonitor takes f over, which is a listener of another network namespace.
func newMonitor(f *os.File, log *slog.Logger) (*monitor, error) {
	d, err := newDoor(f)
	if err != nil {
		return nil, err
	}
	return &monitor{door: d, log: log}, nil
}

// watch begins to answer. Nobody has changed anything in the sandbox yet.
func (m *monitor) watch(r record, box *folder) {
	m.own, m.upper.xattr = r.Instance, "user.overlay."
	if r.Identity.Root {
		m.upper.xattr = "trusted.overlay."
	}
	if len(r.Layers) > 0 {
		m.token = baseToken(r.Dir, r.Layers[0])
		m.based = m.upper.begin(filepath.Join(box.path, fsDir, "workspace"))
	}
	go m.door.serve(maxCallers, m.talk)
}

// baseToken returns the token of the index that the uppermost layer holds, or
// nothing when that layer is another one than the index was made up in: a file
// that was copied, by a snapshot or because somebody touched it, has another
// inode than the one it names.
func baseToken(dir, layer string) string {
	top, err := unix.Open(filepath.Join(layerPath(dir, layer), "workspace"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(top)
	fd, err := openBeneath(top, monitorTokenFile, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK)
	if err != nil {
		return ""
	}
	f := os.NewFile(uintptr(fd), monitorTokenFile)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken))
	var st unix.Stat_t
	if err != nil || unix.Fstat(fd, &st) != nil {
		return ""
	}
	token, inode, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	if inode != strconv.FormatUint(st.Ino, 10) {
		return ""
	}
	return token
}

// talk reads the token that git has and writes what has changed since.
func (m *monitor) talk(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(monitorPatience)) // an error shows at the next call
	line, err := bufio.NewReader(io.LimitReader(c, maxToken)).ReadString('\n')
	if err != nil {
		return
	}
	said := m.answer(strings.TrimSuffix(line, "\n"))
	_ = c.SetDeadline(time.Now().Add(monitorPatience))
	_, _ = c.Write(said) // who does not listen has nothing of it
}

// everything is what git takes for "any file may have changed".
const everything = "/"

// answer returns a new token and the paths that can have changed since the one
// given, each ended by a zero byte.
func (m *monitor) answer(token string) []byte {
	m.looking.Lock()
	defer m.looking.Unlock()
	unsure := []byte(sandbox.Unsure + "\x00" + everything + "\x00")
	if !m.based || time.Now().Before(m.idle) {
		return unsure
	}
	// At most half of the supervisor's time goes into this.
	time.Sleep(time.Until(m.rested))
	start := time.Now()
	moved, err := m.upper.look()
	m.rested = time.Now().Add(min(time.Since(start), time.Second))
	if err != nil {
		m.log.Info("git is told nothing of changed files", "err", err)
		m.epoch++
		if errors.Is(err, errCrowded) {
			m.idle = time.Now().Add(monitorRest)
		}
		return unsure
	}
	prefix := m.own + "." + strconv.Itoa(m.epoch) + "."
	said := append([]byte(prefix+strconv.Itoa(m.upper.looks)), 0)
	since, known := 0, m.token != "" && token == m.token
	if !known {
		n, ours := strings.CutPrefix(token, prefix)
		var err error
		since, err = strconv.Atoi(n)
		known = ours && err == nil && 0 <= since && since <= m.upper.looks
	}
	if !known || moved {
		return append(said, everything+"\x00"...)
	}
	for _, p := range m.upper.since(since) {
		said = append(append(said, p...), 0)
	}
	return said
}

// close ends the listener and all connections.
func (m *monitor) close() {
	if m != nil {
		m.door.close()
	}
}
