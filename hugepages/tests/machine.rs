//! The machine's own pools: the survey everywhere, reservation as root.

use genie_hugepages::{PageSize, ReserveError, Root, reserve, survey};

/// How many 2 MB pages the kernel has now, read without this crate.
fn total() -> Option<u64> {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[test]
fn the_survey_agrees_with_the_kernel() {
    if total().is_none() {
        println!("skipped: this kernel has no 2 MB pages");
        return;
    }
    // Others change the pool too, and the counts are not read at one time: a
    // survey that never once agrees is wrong, one that missed a change is not.
    let survey = (0..1000)
        .map(|_| (survey(&Root::system()).expect("/sys is readable"), total()))
        .find_map(|(survey, total)| {
            let pool = survey.pool(PageSize::MB_2)?;
            let on_nodes: u64 = pool.nodes.iter().map(|node| node.total).sum();
            let agrees = Some(pool.total) == total
                && pool.free <= pool.total
                && (pool.nodes.is_empty() || on_nodes == pool.total);
            agrees.then_some(survey)
        })
        .expect("the survey counts the pages that the kernel counts");
    assert!(survey.memlock.is_some(), "/proc/self/limits has the line");
}

#[test]
fn pages_are_really_reserved_and_really_given_back() {
    const PAGES: u64 = 4;
    if total().is_none() {
        println!("skipped: this kernel has no 2 MB pages");
        return;
    }
    let reservation = match reserve(&Root::system(), PageSize::MB_2, PAGES, None) {
        Ok(reservation) => reservation,
        Err(
            error @ (ReserveError::NotPermitted { .. }
            | ReserveError::ReadOnly { .. }
            | ReserveError::Short { .. }),
        ) => {
            println!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!(reservation.pages(), PAGES);
    assert!(total().is_some_and(|total| total >= PAGES));
    let released = reservation.release().expect("root may give back");
    assert_eq!(released.freed + released.in_use, PAGES);
    assert_eq!(released.missing, 0);
}
