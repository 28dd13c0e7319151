package gvisor

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"time"
)

// An image is a read-only file system in one file, in the format EROFS
// (docs.kernel.org/filesystems/erofs.html), which gVisor's kernel reads by
// itself. A base and the root of a sandbox are images: what a stranger called
// his files, and whom they belong to, is data in our file and never a name or
// an owner on the host.
//
// Of the format there is what gVisor reads: blocks of 4 KiB, extended inodes,
// data that is not compressed, no extended attributes. File data comes first,
// in the order it was added, then folders, then inodes, and the superblock is
// written last.
type imageWriter struct {
	to     io.WriterAt
	root   *imageNode
	count  int
	blocks uint32 // how many are taken
	buf    []byte
	err    error
}

// An imageEntry is one file to put into an image.
type imageEntry struct {
	Path     string // absolute
	Mode     uint32 // type and permissions, as st_mode
	UID, GID uint32
	Time     time.Time
	Size     int64  // of a regular file
	Link     string // where a symbolic link leads; of a regular file: the path of an earlier one that it is the same file as
}

type imageNode struct {
	imageEntry
	children map[string]*imageNode // of a folder
	parent   *imageNode
	names    uint32 // how many names it has
	data     uint32 // first block of its data
	size     uint64
	at       int64 // of the inode, from the start of all inodes
	done     bool  // it has its place among the inodes
}

// Types of files in a mode, as in stat(2).
const (
	typeMask = 0o170000
	typePipe = 0o010000
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
)

// Of the format.
const (
	imageMagic     = 0xe0f5e1e2
	imageBlock     = 4096
	imageSuper     = 1024 // where the superblock stands
	imageSuperSize = 128
	imageInode     = 64
	imageSlot      = 32 // inodes stand at multiples of it
	imageDirent    = 12
	imageChecksum  = 1 // a feature: the superblock has one
	imageExtended  = 1
	imageInline    = imageExtended | 2<<1 // the data follows the inode
)

// maxImageFiles bounds what is kept in memory of an image that is written.
const maxImageFiles = 8 << 20

// maxName is the longest name of a file.
const maxName = 255

var errImage = errors.New("cannot be put into an image")

// newImage begins an image in an empty file. Its root folder is root's.
func newImage(to io.WriterAt) *imageWriter {
	root := &imageNode{imageEntry: imageEntry{Path: "/", Mode: typeDir | 0o755, Time: time.Unix(0, 0)}, children: map[string]*imageNode{}, names: 2}
	root.parent = root
	return &imageWriter{to: to, root: root, count: 1, blocks: 1}
}

// add puts a file into the image. Its folder must be there already. Adding a
// folder again changes what it says of itself.
func (w *imageWriter) add(e imageEntry, data io.Reader) error {
	if w.err != nil {
		return w.err
	}
	if err := w.put(e, data); err != nil {
		w.err = fmt.Errorf("%q: %w", e.Path, err)
	}
	return w.err
}

func (w *imageWriter) put(e imageEntry, data io.Reader) error {
	if !path.IsAbs(e.Path) || path.Clean(e.Path) != e.Path || strings.IndexByte(e.Path, 0) >= 0 {
		return fmt.Errorf("%w: not a clean absolute path", errImage)
	}
	if e.Path == "/" {
		if e.Mode&typeMask != typeDir {
			return fmt.Errorf("%w: the root is a folder", errImage)
		}
		w.root.imageEntry = e
		return nil
	}
	dir, err := w.find(path.Dir(e.Path))
	if err != nil {
		return err
	}
	name := path.Base(e.Path)
	if dir.children == nil || len(name) > maxName {
		return fmt.Errorf("%w: not in a folder, or its name is too long", errImage)
	}
	if old := dir.children[name]; old != nil {
		if e.Mode&typeMask != typeDir || old.children == nil {
			return fmt.Errorf("%w: it is there already", errImage)
		}
		old.imageEntry = e
		return nil
	}
	if w.count >= maxImageFiles {
		return fmt.Errorf("%w: more than %d files", errImage, maxImageFiles)
	}
	n := &imageNode{imageEntry: e, parent: dir, names: 1}
	switch e.Mode & typeMask {
	case typeDir:
		n.children, n.names = map[string]*imageNode{}, 2
		dir.names++
	case typeFile:
		if e.Link != "" {
			same, err := w.find(e.Link)
			if err != nil {
				return err
			}
			if same.Mode&typeMask != typeFile {
				return fmt.Errorf("%w: not the same as a regular file", errImage)
			}
			same.names++
			dir.children[name] = same
			return nil
		}
		if n.data, err = w.write(io.LimitReader(data, e.Size), e.Size); err != nil {
			return err
		}
		n.size = uint64(e.Size)
	case typeLink:
		if e.Link == "" || len(e.Link) >= imageBlock || strings.IndexByte(e.Link, 0) >= 0 {
			return fmt.Errorf("%w: a link to %d bytes", errImage, len(e.Link))
		}
		n.size = uint64(len(e.Link))
		if !n.inline() {
			if n.data, err = w.write(strings.NewReader(e.Link), int64(len(e.Link))); err != nil {
				return err
			}
		}
	case typePipe:
	default:
		return fmt.Errorf("%w: mode %o", errImage, e.Mode)
	}
	dir.children[name] = n
	w.count++
	return nil
}

func (w *imageWriter) find(p string) (*imageNode, error) {
	n := w.root
	for name := range strings.SplitSeq(strings.TrimPrefix(p, "/"), "/") {
		if name == "" {
			continue
		}
		if n = n.children[name]; n == nil {
			return nil, fmt.Errorf("%w: there is no %q", errImage, p)
		}
	}
	return n, nil
}

// write puts size bytes into blocks of their own and returns the first.
// Blocks of zeros are left out of the file.
func (w *imageWriter) write(r io.Reader, size int64) (uint32, error) {
	first := w.blocks
	if size < 0 || int64(w.blocks)+(size+imageBlock-1)/imageBlock > math.MaxUint32 {
		return 0, fmt.Errorf("%w: it is too large", errImage)
	}
	if w.buf == nil {
		w.buf = make([]byte, 64*imageBlock)
	}
	for at := int64(0); at < size; {
		part := w.buf[:min(size-at, int64(len(w.buf)))]
		if _, err := io.ReadFull(r, part); err != nil {
			return 0, err
		}
		if !zeros(part) {
			if _, err := w.to.WriteAt(part, int64(first)*imageBlock+at); err != nil {
				return 0, err
			}
		}
		at += int64(len(part))
	}
	w.blocks += uint32((size + imageBlock - 1) / imageBlock)
	return first, nil
}

func zeros(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// finish writes folders, inodes and the superblock. The file is a multiple of
// a block long, and whole when this returns nil and the file was synced.
func (w *imageWriter) finish() error {
	if w.err != nil {
		return w.err
	}
	w.err = errors.New("the image is finished")
	var order []*imageNode
	var end int64
	w.place(w.root, &order, &end)
	for _, n := range order {
		if n.children == nil {
			continue
		}
		data := n.dirents()
		block, err := w.write(strings.NewReader(data), int64(len(data)))
		if err != nil {
			return err
		}
		n.data, n.size = block, uint64(len(data))
	}
	meta := w.blocks
	out := bufio.NewWriterSize(io.NewOffsetWriter(w.to, int64(meta)*imageBlock), 1<<20)
	at := int64(0)
	for _, n := range order {
		if _, err := out.Write(make([]byte, n.at-at)); err != nil {
			return err
		}
		b := n.inode()
		if _, err := out.Write(b); err != nil {
			return err
		}
		at = n.at + int64(len(b))
	}
	w.blocks += uint32((end + imageBlock - 1) / imageBlock)
	if _, err := out.Write(make([]byte, int64(w.blocks-meta)*imageBlock-at)); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	_, err := w.to.WriteAt(w.super(meta, uint64(len(order))), 0)
	return err
}

// place gives every inode its place, the root's first, and returns them in
// that order.
func (w *imageWriter) place(n *imageNode, order *[]*imageNode, end *int64) {
	if n.done {
		return // another name of the same file
	}
	n.done = true
	size := int64(imageInode)
	if n.inline() {
		size += int64(len(n.Link))
		if room := imageBlock - *end%imageBlock; room < size {
			*end += room // inline data must not cross into the next block
		}
	}
	n.at = *end
	*end += (size + imageSlot - 1) / imageSlot * imageSlot
	*order = append(*order, n)
	for _, name := range n.sorted() {
		w.place(n.children[name], order, end)
	}
}

// inline reports whether the data stands beside the inode.
func (n *imageNode) inline() bool {
	return n.Mode&typeMask == typeLink && len(n.Link) <= imageBlock/4
}

func (n *imageNode) nid() uint64 { return uint64(n.at / imageSlot) }

func (n *imageNode) sorted() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// dirents are the blocks of a folder: in each the entries, then their names.
// The last block ends with its last name.
func (n *imageNode) dirents() string {
	type entry struct {
		name string
		of   *imageNode
	}
	entries := make([]entry, 0, len(n.children)+2)
	entries = append(entries, entry{".", n}, entry{"..", n.parent})
	for name, c := range n.children {
		entries = append(entries, entry{name, c})
	}
	slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	var out strings.Builder
	for len(entries) > 0 {
		fit, size := 0, 0
		for fit < len(entries) && size+imageDirent+len(entries[fit].name) <= imageBlock {
			size += imageDirent + len(entries[fit].name)
			fit++
		}
		head := make([]byte, 0, imageBlock)
		var names strings.Builder
		for _, e := range entries[:fit] {
			head = binary.LittleEndian.AppendUint64(head, e.of.nid())
			head = binary.LittleEndian.AppendUint16(head, uint16(fit*imageDirent+names.Len()))
			head = append(head, direntType(e.of.Mode), 0)
			names.WriteString(e.name)
		}
		out.Write(head)
		out.WriteString(names.String())
		if entries = entries[fit:]; len(entries) > 0 {
			out.Write(make([]byte, imageBlock-size))
		}
	}
	return out.String()
}

// direntType is the type as readdir(3) tells it, in EROFS's own numbers.
func direntType(mode uint32) byte {
	switch mode & typeMask {
	case typeFile:
		return 1
	case typeDir:
		return 2
	case typePipe:
		return 5
	}
	return 7 // a symbolic link
}

func (n *imageNode) inode() []byte {
	format := uint16(imageExtended)
	if n.inline() {
		format = imageInline
	}
	b := make([]byte, 0, imageInode+len(n.Link))
	b = binary.LittleEndian.AppendUint16(b, format)
	b = binary.LittleEndian.AppendUint16(b, 0) // no extended attributes
	b = binary.LittleEndian.AppendUint16(b, uint16(n.Mode))
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint64(b, n.size)
	b = binary.LittleEndian.AppendUint32(b, n.data)
	b = binary.LittleEndian.AppendUint32(b, uint32(n.nid()))
	b = binary.LittleEndian.AppendUint32(b, n.UID)
	b = binary.LittleEndian.AppendUint32(b, n.GID)
	b = binary.LittleEndian.AppendUint64(b, uint64(n.Time.Unix()))
	b = binary.LittleEndian.AppendUint32(b, uint32(n.Time.Nanosecond()))
	b = binary.LittleEndian.AppendUint32(b, n.names)
	b = append(b, make([]byte, imageInode-len(b))...)
	if n.inline() {
		b = append(b, n.Link...)
	}
	return b
}

// super is the first block.
func (w *imageWriter) super(meta uint32, inodes uint64) []byte {
	b := make([]byte, imageBlock)
	s := b[imageSuper : imageSuper+imageSuperSize]
	binary.LittleEndian.PutUint32(s[0:], imageMagic)
	binary.LittleEndian.PutUint32(s[8:], imageChecksum)
	s[12] = 12 // blocks of 1<<12 bytes
	binary.LittleEndian.PutUint16(s[14:], uint16(w.root.nid()))
	binary.LittleEndian.PutUint64(s[16:], inodes)
	binary.LittleEndian.PutUint32(s[36:], w.blocks)
	binary.LittleEndian.PutUint32(s[40:], meta)
	binary.LittleEndian.PutUint32(s[4:], superSum(b))
	return b
}

// superSum is the checksum of the first block, whose own place holds zeros.
func superSum(block []byte) uint32 {
	return ^crc32.Checksum(block[imageSuper:], crc32.MakeTable(crc32.Castagnoli))
}

// checkImage returns nil when f, of the given size, begins like an image of
// ours and is as long as it says. What is in it is not looked at.
func checkImage(f io.ReaderAt, size int64) error {
	b := make([]byte, imageBlock)
	if _, err := f.ReadAt(b, 0); err != nil {
		return fmt.Errorf("no image: %w", err)
	}
	s := b[imageSuper : imageSuper+imageSuperSize]
	sum := binary.LittleEndian.Uint32(s[4:])
	binary.LittleEndian.PutUint32(s[4:], 0)
	switch {
	case binary.LittleEndian.Uint32(s[0:]) != imageMagic, sum != superSum(b):
		return errors.New("no image: its first block is damaged")
	case int64(binary.LittleEndian.Uint32(s[36:]))*imageBlock != size:
		return fmt.Errorf("the image is %d bytes long, and should be %d", size, int64(binary.LittleEndian.Uint32(s[36:]))*imageBlock)
	}
	return nil
}
