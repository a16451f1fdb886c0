package nsm

// OpenSession is OpenDevice with another device.
var OpenSession = openSession
