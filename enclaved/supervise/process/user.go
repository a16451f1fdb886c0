package process

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/workload"
)

// maxAccounts bounds an image's /etc/passwd and /etc/group, in bytes.
const maxAccounts = 4 << 20

// account is a line of /etc/passwd (passwd(5)).
type account struct {
	name     string
	uid, gid int
	home     string
}

// group is a line of /etc/group (group(5)).
type group struct {
	name    string
	gid     int
	members []string
}

// setUser sets ids from the manifest's user and the image's, and returns the home directory. A name or
// an id is looked up in the image's own files, as container runtimes do: the groups are the account's,
// unless the image or the manifest names one.
func (s *Spec) setUser(u *workload.User, imageUser string) (home string, err error) {
	accounts, groups, err := readAccounts(s.Root)
	if err != nil {
		return "", err
	}
	if u == nil {
		u = &workload.User{}
	}
	user, groupName, _ := strings.Cut(imageUser, ":")
	if u.UID != nil {
		user, groupName = strconv.FormatInt(*u.UID, 10), ""
	}
	if user == "" {
		user = "0"
	}
	me, err := findAccount(accounts, user)
	if err != nil {
		return "", err
	}
	switch {
	case u.GID != nil:
		me.gid = int(*u.GID)
	case groupName != "":
		if me.gid, err = findGroup(groups, groupName); err != nil {
			return "", err
		}
	}
	if u.NonRoot && me.uid == 0 {
		return "", errors.New("the pod says runAsNonRoot and the image's user is root: set runAsUser in the pod")
	}
	s.UID, s.GID = me.uid, me.gid
	s.Groups = []int{me.gid}
	for _, g := range groups {
		if me.name != "" && slices.Contains(g.members, me.name) {
			s.Groups = append(s.Groups, g.gid)
		}
	}
	for _, g := range u.Groups {
		s.Groups = append(s.Groups, int(g))
	}
	slices.Sort(s.Groups)
	s.Groups = slices.Compact(s.Groups)
	return me.home, nil
}

// findAccount returns the account of a name or an id. An id needs no account: it has group 0 then.
func findAccount(accounts []account, user string) (account, error) {
	uid, err := parseID(user)
	isID := err == nil
	for _, a := range accounts {
		if (isID && a.uid == uid) || (!isID && a.name == user) {
			if a.home == "" {
				a.home = "/"
			}
			return a, nil
		}
	}
	if isID {
		return account{uid: uid, home: "/"}, nil
	}
	return account{}, fmt.Errorf("the image's user %q is not in the image's /etc/passwd", user)
}

func findGroup(groups []group, name string) (int, error) {
	if gid, err := parseID(name); err == nil {
		return gid, nil
	}
	for _, g := range groups {
		if g.name == name {
			return g.gid, nil
		}
	}
	return 0, fmt.Errorf("the group %q of the image's user is not in the image's /etc/group", name)
}

func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > math.MaxInt32 {
		return 0, fmt.Errorf("%q is not an id", s)
	}
	return int(n), nil
}

// readAccounts reads the image's accounts; a file that is not there has none.
func readAccounts(root string) ([]account, []group, error) {
	passwd, err := readInRoot(root, "etc/passwd")
	if err != nil {
		return nil, nil, err
	}
	groups, err := readInRoot(root, "etc/group")
	if err != nil {
		return nil, nil, err
	}
	return parseAccounts(passwd), parseGroups(groups), nil
}

// parseAccounts reads the lines of /etc/passwd that are well formed.
func parseAccounts(passwd []byte) (accounts []account) {
	for line := range strings.Lines(string(passwd)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) != 7 {
			continue
		}
		uid, err1 := parseID(f[2])
		gid, err2 := parseID(f[3])
		if err1 == nil && err2 == nil {
			accounts = append(accounts, account{f[0], uid, gid, f[5]})
		}
	}
	return accounts
}

// parseGroups reads the lines of /etc/group that are well formed.
func parseGroups(file []byte) (groups []group) {
	for line := range strings.Lines(string(file)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) != 4 {
			continue
		}
		if gid, err := parseID(f[2]); err == nil {
			groups = append(groups, group{f[0], gid, strings.Split(f[3], ",")})
		}
	}
	return groups
}

// readInRoot reads a regular file of the image, whose links lead nowhere outside. It returns nothing
// where there is none.
func readInRoot(root, name string) ([]byte, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the image's root: %w", err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, // a FIFO must not keep us
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the image's /%s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if i, err := f.Stat(); err != nil || !i.Mode().IsRegular() {
		return nil, fmt.Errorf("the image's /%s is not a regular file", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxAccounts+1))
	if err != nil {
		return nil, fmt.Errorf("read the image's /%s: %w", name, err)
	}
	if len(b) > maxAccounts {
		return nil, fmt.Errorf("the image's /%s has more than %d bytes", name, maxAccounts)
	}
	return b, nil
}
