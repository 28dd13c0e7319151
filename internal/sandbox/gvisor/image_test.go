package gvisor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// inMemory is a file to write an image to.
type inMemory struct{ b []byte }

func (m *inMemory) WriteAt(p []byte, at int64) (int, error) {
	if at+int64(len(p)) > 64<<20 {
		return 0, errors.New("too large for a test")
	}
	if end := int(at) + len(p); end > len(m.b) {
		m.b = append(m.b, make([]byte, end-len(m.b))...)
	}
	return copy(m.b[at:], p), nil
}

// read walks an image as the format says, and returns its files: what is
// written here is read by gVisor's own code in the tests of sandboxes.
func read(b []byte) (map[string]string, error) {
	s := b[imageSuper:]
	meta := int(binary.LittleEndian.Uint32(s[40:])) * imageBlock
	files := map[string]string{}
	var walk func(nid uint64, name string, depth int) error
	walk = func(nid uint64, name string, depth int) error {
		i := b[meta+int(nid)*imageSlot:]
		mode, size, data := binary.LittleEndian.Uint16(i[4:]), int(binary.LittleEndian.Uint64(i[8:])), int(binary.LittleEndian.Uint32(i[16:]))*imageBlock
		content := ""
		if binary.LittleEndian.Uint16(i)>>1 == 2 {
			content = string(i[imageInode : imageInode+size])
		} else if size > 0 {
			if data+size > len(b) {
				return fmt.Errorf("%s: %d bytes at %d of %d", name, size, data, len(b))
			}
			content = string(b[data : data+size])
		}
		if mode&typeMask != typeDir {
			files[name] = fmt.Sprintf("%o %d:%d %d %s", mode, binary.LittleEndian.Uint32(i[24:]), binary.LittleEndian.Uint32(i[28:]), binary.LittleEndian.Uint32(i[44:]), content)
			return nil
		}
		files[name] = fmt.Sprintf("%o", mode)
		last := ""
		for at := 0; at < len(content); at += imageBlock {
			block := content[at:min(at+imageBlock, len(content))]
			n := int(binary.LittleEndian.Uint16([]byte(block[8:]))) / imageDirent
			for e := range n {
				entry := []byte(block[e*imageDirent:])
				from, to := int(binary.LittleEndian.Uint16(entry[8:])), len(block)
				if e+1 < n {
					to = int(binary.LittleEndian.Uint16(entry[imageDirent+8:]))
				}
				child := strings.TrimRight(block[from:to], "\x00")
				if child <= last || child == "" {
					return fmt.Errorf("%s: %q comes after %q", name, child, last)
				}
				last = child
				if child == "." || child == ".." {
					continue
				}
				if err := walk(binary.LittleEndian.Uint64(entry), filepath.Join(name, child), depth+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return files, walk(uint64(binary.LittleEndian.Uint16(s[14:])), "/", 0)
}

func TestAnImageHoldsWhatWasPutIntoIt(t *testing.T) {
	var m inMemory
	w := newImage(&m)
	want := map[string]string{"/": "40755"}
	add := func(e imageEntry, data string) {
		t.Helper()
		e.Time = time.Unix(1700000000, 123456789)
		if e.Mode&typeMask == typeFile && e.Link == "" {
			e.Size = int64(len(data))
		}
		if err := w.add(e, strings.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		switch e.Mode & typeMask {
		case typeDir:
			want[e.Path] = fmt.Sprintf("%o", e.Mode)
		case typeLink:
			data = e.Link
			fallthrough
		default:
			if e.Link != "" && e.Mode&typeMask == typeFile {
				want[e.Link] = strings.Replace(want[e.Link], " 1 ", " 2 ", 1)
				want[e.Path] = want[e.Link]
				return
			}
			want[e.Path] = fmt.Sprintf("%o %d:%d 1 %s", e.Mode, e.UID, e.GID, data)
		}
	}
	add(imageEntry{Path: "/dir", Mode: typeDir | 0o1777}, "")
	add(imageEntry{Path: "/dir", Mode: typeDir | 0o700}, "") // said again
	add(imageEntry{Path: "/empty", Mode: typeFile | 0o600, UID: 1000, GID: 100}, "")
	add(imageEntry{Path: "/dir/one block", Mode: typeFile | 0o644}, strings.Repeat("b", imageBlock))
	add(imageEntry{Path: "/dir/more", Mode: typeFile | 0o4755, UID: 1 << 30}, strings.Repeat("m", 3*imageBlock+1))
	add(imageEntry{Path: "/dir/zeros", Mode: typeFile | 0o644}, strings.Repeat("\x00", 600*imageBlock)+"end")
	add(imageEntry{Path: "/dir/same", Mode: typeFile | 0o4755, Link: "/dir/more"}, "")
	add(imageEntry{Path: "/pipe", Mode: typePipe | 0o644}, "")
	add(imageEntry{Path: "/\xff\xfe not text", Mode: typeLink | 0o777, Link: "to\xff"}, "")
	add(imageEntry{Path: "/long-link", Mode: typeLink | 0o777, Link: strings.Repeat("l", imageBlock-1)}, "")
	add(imageEntry{Path: "/many", Mode: typeDir | 0o755}, "")
	for i := range 2000 { // folders of many blocks, links that do not fit where they would stand
		add(imageEntry{Path: fmt.Sprintf("/many/%d-%s", i, strings.Repeat("n", i%240)), Mode: typeLink | 0o777, Link: strings.Repeat("x", 1+i%1000)}, "")
	}
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
	got, err := read(m.b)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range want {
		if got[name] != text {
			t.Errorf("%q: %.80q, want %.80q", name, got[name], text)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d files, want %d", len(got), len(want))
	}
	if err := checkImage(bytes.NewReader(m.b), int64(len(m.b))); err != nil {
		t.Error(err)
	}
}

func TestADamagedImageIsNone(t *testing.T) {
	var m inMemory
	w := newImage(&m)
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
	whole := m.b
	if err := checkImage(bytes.NewReader(whole), int64(len(whole))); err != nil {
		t.Fatal(err)
	}
	for what, b := range map[string][]byte{
		"empty": nil, "short": whole[:100], "cut": whole[:len(whole)-imageBlock], "longer": append(bytes.Clone(whole), 0),
		"changed": append(bytes.Repeat([]byte{1}, imageBlock), whole[imageBlock:]...),
	} {
		if err := checkImage(bytes.NewReader(b), int64(len(b))); err == nil {
			t.Errorf("%s: it passes", what)
		}
	}
}

func TestWhatCannotBeInAnImageIsRefused(t *testing.T) {
	for what, e := range map[string]imageEntry{
		"relative":         {Path: "a", Mode: typeFile},
		"dots":             {Path: "/../a", Mode: typeFile},
		"zero":             {Path: "/a\x00b", Mode: typeFile},
		"no folder":        {Path: "/no/a", Mode: typeFile},
		"in a file":        {Path: "/file/a", Mode: typeFile},
		"twice":            {Path: "/file", Mode: typeFile},
		"a device":         {Path: "/null", Mode: 0o020666},
		"long name":        {Path: "/" + strings.Repeat("n", 256), Mode: typeFile},
		"link nowhere":     {Path: "/l", Mode: typeLink},
		"long link":        {Path: "/l", Mode: typeLink, Link: strings.Repeat("l", imageBlock)},
		"same as nothing":  {Path: "/l", Mode: typeFile, Link: "/nothing"},
		"same as a folder": {Path: "/l", Mode: typeFile, Link: "/"},
		"negative":         {Path: "/l", Mode: typeFile, Size: -1},
		"too large":        {Path: "/l", Mode: typeFile, Size: 1 << 62},
		"root is a file":   {Path: "/", Mode: typeFile},
		"data is missing":  {Path: "/l", Mode: typeFile, Size: 10},
	} {
		w := newImage(&inMemory{})
		if err := w.add(imageEntry{Path: "/file", Mode: typeFile}, nil); err != nil {
			t.Fatal(err)
		}
		if err := w.add(e, strings.NewReader("short")); err == nil {
			t.Errorf("%s: it was taken", what)
		}
		if w.finish() == nil {
			t.Errorf("%s: the image was finished all the same", what)
		}
	}
}

// FuzzUnpack puts what a hostile init may send into an image: what comes out
// is refused, or is an image that can be read.
func FuzzUnpack(f *testing.F) {
	seed := func(entries ...packed) {
		var b bytes.Buffer
		for _, e := range entries {
			if err := writeMessage(&b, e); err != nil {
				f.Fatal(err)
			}
			b.Write(make([]byte, e.Size))
		}
		if err := writeChunk(&b, nil); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	seed(packed{Path: []byte("/workspace"), Mode: typeDir | 0o755}, packed{Path: []byte("/workspace/f"), Mode: typeFile | 0o644, Size: 5})
	seed(packed{Path: []byte("/a"), Mode: typeLink | 0o777, Link: []byte("../../etc")}, packed{Path: []byte("/p"), Mode: typePipe})
	seed(packed{Path: []byte("/a"), Mode: typeFile, Sec: -1, Nsec: -1}, packed{Path: []byte("/b"), Mode: typeFile, Link: []byte("/a")})
	seed(packed{Fault: "no more"})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m inMemory
		if err := unpack(bytes.NewReader(b), newImage(&m)); err != nil {
			return
		}
		if err := checkImage(bytes.NewReader(m.b), int64(len(m.b))); err != nil {
			t.Fatal(err)
		}
		if _, err := read(m.b); err != nil {
			t.Error(err)
		}
	})
}

func TestThePinnedVersionIsTheTestedOne(t *testing.T) {
	b, err := os.ReadFile("../../../tests/runsc/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "gvisor.dev/gvisor "+TestedVersion+" ") {
		t.Errorf("tests/runsc does not build %s", TestedVersion)
	}
}
