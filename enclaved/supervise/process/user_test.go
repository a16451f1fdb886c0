package process

import (
	"math"
	"strconv"
	"testing"
)

// An image's accounts never give a process an id that the kernel has not, or somebody else's.
func FuzzAccounts(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv/web:/bin/sh\n", "root:x:0:\nweb:x:34:web,root\n", "web", "web")
	f.Add("a:x:4294967295:0::/:\nb:x:-1:0::/:\n:x:+1:00::/:\n", "g:x:4294967296:a\n::\n", "a", "4294967295")
	f.Add("1:x:2:3::::\n2:x:1:3:::\r\n", "1:x:2:\n", "1", "1")
	f.Add("\x00:x:1:1::\x00:\xff", ":::,,", "", "")
	f.Fuzz(func(t *testing.T, passwd, groupFile, user, group string) {
		valid := func(id int) bool { return id >= 0 && id <= math.MaxInt32 }
		accounts, groups := parseAccounts([]byte(passwd)), parseGroups([]byte(groupFile))
		for _, a := range accounts {
			if !valid(a.uid) || !valid(a.gid) {
				t.Errorf("account %+v", a)
			}
		}
		for _, g := range groups {
			if !valid(g.gid) {
				t.Errorf("group %+v", g)
			}
		}
		if a, err := findAccount(accounts, user); err == nil {
			if id, notID := strconv.ParseUint(user, 10, 31); notID == nil && a.uid != int(id) || notID != nil && a.name != user {
				t.Errorf("user %q is %+v", user, a)
			}
			if !valid(a.uid) || !valid(a.gid) || a.home == "" {
				t.Errorf("user %q is %+v", user, a)
			}
		}
		if gid, err := findGroup(groups, group); err == nil && !valid(gid) {
			t.Errorf("group %q is %d", group, gid)
		}
	})
}
