package config

// Nearest returns the known word that somebody who wrote word most likely meant: the one with the
// fewest edits, if that is at most a third of its length, else "". Words longer than any name of Kubernetes have none:
// whoever may create pods chooses both, and the comparison takes time by the product of their lengths.
func Nearest(word string, known []string) string {
	const longest = 253
	if len(word) > longest {
		return ""
	}
	best, bestDistance := "", 0
	for _, k := range known {
		if len(k) > longest {
			continue
		}
		d := distance(word, k)
		if d <= (len(k)+2)/3 && (best == "" || d < bestDistance) {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance of a and b in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
